"""Evaluation beyond the loss: generated samples, text metrics, benchmark. Each from a YAML, on a tiny model."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainerCallback

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.core.builders.causal import HFCausalTrainerBuilder
from axolotl.core.trainers.batch_size import largest_that_fits
from axolotl.evaluate import evaluate
from axolotl.exceptions import ConfigError, DatasetError, OutOfMemoryError
from axolotl.train import setup_model_and_trainer, train
from tests.integration.training_runs import run_on_ranks
from tests.tiny import make_tiny_base

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lora_target_linear": True}
SAMPLES = {
    "generate_samples": True,
    "num_generation_samples": 2,
    "generation_max_new_tokens": 6,
    "generation_top_k": 5,
    "generation_top_p": 0.9,
}


def write_inputs(folder: Path) -> None:
    """A model, rows to train on and questions of a benchmark."""
    make_tiny_base(folder / "base")
    rng = random.Random(0)
    pairs = [(rng.randint(0, 50), rng.randint(0, 50)) for _ in range(24)]
    rows = [{"instruction": f"add {a} and {b}", "input": "", "output": f"{a + b}"} for a, b in pairs]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    questions = [
        {"input": f"{a} + 1? A: {a + 1} B: {a}\nAnswer:", "output": " A" if a % 2 else "B", "name": f"sums{a % 3}"}
        for a in range(7)
    ]
    (folder / "bench.jsonl").write_text("\n".join(json.dumps(row) for row in questions))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def load(inputs: Path, output_dir: Path, **keys):
    """The config of a run, read from a file."""
    base = {
        "base_model": str(inputs / "base"),
        "datasets": [{"path": str(inputs / "rows.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(inputs / "prepared"),
        "output_dir": str(output_dir),
        "val_set_size": 0.2,
        "sequence_len": 128,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "num_epochs": 1,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "warmup_steps": 1,
        "bf16": False,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_strategy": "no",
    }
    merged = {key: value for key, value in {**base, **keys}.items() if value is not None}
    path = output_dir.with_suffix(".yml")
    path.write_text(yaml.safe_dump(merged))
    return load_cfg(path)


def run(cfg):
    return train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))[2]


def steps_of(trainer):
    """What must not change: losses and gradient norms of every step, losses of every evaluation."""
    return [
        (entry["step"], entry.get("loss"), entry.get("grad_norm"), entry.get("eval_loss"))
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]


def samples_in(cfg, name="generated_samples"):
    return [json.loads(line) for line in (Path(cfg.output_dir) / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("keys", [{}, LORA, {**LORA, "sample_packing": True}], ids=["full", "lora", "packed"])
def test_samples_leave_the_training_as_it_was(inputs, tmp_path, keys):
    plain = run(load(inputs, tmp_path / "plain", **keys))
    cfg = load(inputs, tmp_path / "samples", **keys, **SAMPLES, gradient_checkpointing=True if keys else None)
    assert steps_of(run(cfg)) == steps_of(plain)
    samples = samples_in(cfg)
    assert [sample["step"] for sample in samples] == [0, 0, 2, 2, 4, 4]
    for sample in samples:
        assert sample["prompt"].startswith("<s>Below is an instruction")
        assert sample["prompt"].endswith("### Response:\n")
        assert sample["reference"].isdigit()
    # The same prompts each time, so that answers can be compared.
    assert [sample["prompt"] for sample in samples[:2]] == [sample["prompt"] for sample in samples[4:]]


def test_a_resumed_run_does_not_write_samples_twice(inputs, tmp_path):
    whole = load(inputs, tmp_path / "whole", **SAMPLES, save_strategy=None, save_steps=2)
    run(whole)
    expected = samples_in(whole)
    shutil.rmtree(Path(whole.output_dir) / "checkpoint-4")
    again = load(
        inputs, tmp_path / "whole", **SAMPLES, save_strategy=None, save_steps=2, auto_resume_from_checkpoints=True
    )
    trainer = run(again)
    assert 0 < trainer.num_tokens_this_session < trainer.num_tokens_seen
    assert samples_in(again) == expected


def test_samples_follow_from_the_seed(inputs, tmp_path):
    both = []
    for name in ("one", "two"):
        cfg = load(inputs, tmp_path / name, **SAMPLES)
        run(cfg)
        both.append(samples_in(cfg))
    assert both[0] == both[1]


def test_rows_that_train_on_everything_are_cut_at_the_ratio(inputs, tmp_path):
    rows = [{"text": "The quick brown fox jumps over the lazy dog. How many legs has a dog?"}] * 12
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    keys = {"datasets": [{"path": str(tmp_path / "text.jsonl"), "type": "completion"}], "val_set_size": 3}
    lengths = []
    for ratio in (0.25, 0.75):
        cfg = load(inputs, tmp_path / f"run{ratio}", **keys, **SAMPLES, generation_prompt_ratio=ratio)
        run(cfg)
        sample = samples_in(cfg)[0]
        assert (sample["prompt"] + sample["reference"]).removeprefix("<s>") == rows[0]["text"]
        lengths.append(len(sample["prompt"]))
    assert lengths[0] < lengths[1] / 2


def test_a_temperature_of_zero_is_greedy(inputs, tmp_path):
    greedy = load(inputs, tmp_path / "greedy", **SAMPLES, generation_do_sample=False)
    cold = load(inputs, tmp_path / "cold", **SAMPLES, generation_temperature=0.0)
    for cfg in (greedy, cold):
        run(cfg)
    assert samples_in(greedy) == samples_in(cold)


def test_samples_go_to_tensorboard(inputs, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = load(inputs, tmp_path / "out", **SAMPLES, use_tensorboard=True)
    run(cfg)
    (events,) = Path(cfg.output_dir).rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events.parent), size_guidance={"tensors": 0}).Reload()
    found = log.Tensors("generated_samples/text_summary")
    assert [event.step for event in found] == [0, 2, 4]
    assert b"Below is an instruction" in found[0].tensor_proto.string_val[0]


def test_samples_go_to_wandb(inputs, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = load(inputs, tmp_path / "out", **SAMPLES, wandb_project="samples", wandb_mode="offline")
    run(cfg)
    import wandb

    wandb.finish()
    tables = list(tmp_path.rglob("media/table/generated_samples_*.table.json"))
    assert len(tables) == 3
    assert json.loads(tables[0].read_text())["columns"][1] == "Prompt"


def test_the_prediction_table_is_greedy_and_has_a_file_of_its_own(inputs, tmp_path):
    cfg = load(inputs, tmp_path / "out", eval_table_size=3, eval_max_new_tokens=4)
    run(cfg)
    predictions = samples_in(cfg, "predictions")
    assert [sample["step"] for sample in predictions] == [0] * 3 + [2] * 3 + [4] * 3


def test_text_metrics_can_choose_the_best_model(inputs, tmp_path):
    pytest.importorskip("sacrebleu")
    cfg = load(
        inputs,
        tmp_path / "out",
        do_causal_lm_eval=True,
        eval_causal_lm_metrics=["sacrebleu", "ter", "chrf", "perplexity"],
        eval_max_new_tokens=4,
        save_strategy=None,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_perplexity",
        greater_is_better=False,
    )
    trainer = run(cfg)
    scores = [entry for entry in trainer.state.log_history if "eval_chrf" in entry]
    assert [entry["step"] for entry in scores] == [0, 2, 4]
    assert {"eval_sacrebleu", "eval_ter", "eval_chrf", "eval_perplexity"} <= set(scores[0])
    assert trainer.state.best_metric == min(entry["eval_perplexity"] for entry in scores[1:])
    metrics = evaluate(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    assert metrics["eval_perplexity"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_a_metric_without_its_package_is_an_error_before_the_model_is_loaded(inputs, tmp_path):
    cfg = load(inputs, tmp_path / "out", do_causal_lm_eval=True, eval_causal_lm_metrics=["comet", "perplexity"])
    cfg["base_model"] = "/nowhere"
    with pytest.raises(ConfigError, match=r"`comet` \(for comet\).*axolotl\[metrics\]' unbabel-comet.*perplexity\]"):
        train(cfg=cfg, dataset_meta=None)


BENCH = {"do_bench_eval": True, "eval_steps": 2}


def test_benchmark(inputs, tmp_path):
    cfg = load(inputs, tmp_path / "out", **BENCH, bench_dataset=str(inputs / "bench.jsonl"), bench_split="test")
    trainer = run(cfg)
    assert steps_of(trainer) == steps_of(run(load(inputs, tmp_path / "plain")))
    scores = [entry for entry in trainer.state.log_history if "test_bench_loss" in entry]
    assert [entry["step"] for entry in scores] == [0, 2, 4]
    by_subject = [scores[0][f"test_bench_accuracy_sums{number}"] for number in range(3)]
    assert scores[0]["test_bench_average_accuracy"] == pytest.approx(sum(by_subject) / 3)
    counts = (3, 2, 2)
    right = sum(count * accuracy for count, accuracy in zip(counts, by_subject, strict=True))
    assert scores[0]["test_bench_total_accuracy"] == pytest.approx(right / 7)


@pytest.mark.parametrize("keys", [{}, {"sample_packing": True}, {"load_best_model_at_end": True, "save_steps": 2}])
def test_a_benchmark_alone_needs_no_rows_to_evaluate_on(inputs, tmp_path, keys):
    best = {"metric_for_best_model": "bench_total_accuracy", "save_strategy": None} if "save_steps" in keys else {}
    cfg = load(
        inputs, tmp_path / "out", **BENCH, **keys, **best, bench_dataset=str(inputs / "bench.jsonl"), val_set_size=0
    )
    trainer = run(cfg)
    scores = [entry["step"] for entry in trainer.state.log_history if "eval_bench_total_accuracy" in entry]
    assert scores == [0, 2, 4]
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)


def test_a_metric_that_no_evaluation_has_is_said_at_the_first_one(inputs, tmp_path):
    keys = {**SAVES, "load_best_model_at_end": True, "metric_for_best_model": "nope"}
    cfg = load(inputs, tmp_path / "out", **keys)
    with pytest.raises(ConfigError, match=r"`metric_for_best_model: nope`.* eval_loss, eval_ppl"):
        run(cfg)
    assert not list(Path(cfg.output_dir).glob("checkpoint-*"))
    assert "eval_loss" in evaluate(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))


@pytest.mark.parametrize("name", ["nobody/has-this/file.json", "mmlu-zs", None])
def test_a_benchmark_that_is_not_reachable_is_an_error_before_the_model_is_loaded(inputs, tmp_path, name):
    cfg = load(inputs, tmp_path / "out", **BENCH, bench_dataset=name)
    with pytest.raises(DatasetError, match=r"`bench_dataset: .*local file"):
        train(cfg=cfg, dataset_meta=None)


def test_a_row_that_is_no_question_is_named(inputs, tmp_path):
    cfg = load(inputs, tmp_path / "out", **BENCH, bench_dataset=str(inputs / "rows.jsonl"))
    with pytest.raises(DatasetError, match=r"row 0.*`output`"):
        train(cfg=cfg, dataset_meta=None)


def _on_a_rank(folder: Path):
    """Samples, text metrics and benchmark on two ranks, and the same without samples."""
    inputs = folder.parent / "inputs"
    metrics = {
        "do_causal_lm_eval": True,
        "eval_causal_lm_metrics": ["perplexity"],
        "bench_dataset": str(inputs / "bench.jsonl"),
    }
    config = load(inputs, folder / "config", **SAMPLES, **BENCH, **metrics, **LORA)
    config["output_dir"] = str(folder.parent / "out")
    with_samples = run(config)
    other = load(inputs, folder / "other", **LORA)
    other["output_dir"] = str(folder.parent / "plain")
    plain = run(other)
    history = with_samples.state.log_history
    bench = [entry["eval_bench_total_accuracy"] for entry in history if "eval_bench_loss" in entry]
    perplexities = [entry["eval_perplexity"] for entry in history if "eval_perplexity" in entry]
    return [steps_of(with_samples) == steps_of(plain), bench, perplexities]


def test_two_ranks(tmp_path):
    write_inputs(tmp_path / "inputs")
    same, bench, perplexities = run_on_ranks(_on_a_rank, tmp_path)
    assert same
    lines = (tmp_path / "out" / "generated_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 0, 2, 2, 4, 4]
    # Before the first step the weights are those of one rank: every question and row is counted once.
    single = run(
        load(
            tmp_path / "inputs",
            tmp_path / "single",
            **BENCH,
            **LORA,
            bench_dataset=str(tmp_path / "inputs" / "bench.jsonl"),
            do_causal_lm_eval=True,
            eval_causal_lm_metrics=["perplexity"],
            max_steps=1,
        )
    ).state.log_history
    assert next(entry["eval_bench_total_accuracy"] for entry in single if "eval_bench_loss" in entry) == bench[0]
    assert next(entry["eval_perplexity"] for entry in single if "eval_perplexity" in entry) == pytest.approx(
        perplexities[0]
    )


def test_on_a_cpu_there_is_no_batch_size_to_find(inputs, tmp_path):
    cfg = load(inputs, tmp_path / "out", auto_find_batch_size=True)
    assert steps_of(run(cfg)) == steps_of(run(load(inputs, tmp_path / "plain")))
    (choice,) = [choice for choice in cfg.resolution if choice["key"] == "auto_find_batch_size"]
    assert "on a cpu" in choice["reason"]


@pytest.mark.parametrize(
    "keys", [LORA, {"sample_packing": True, "gradient_checkpointing": True}], ids=["lora", "packed"]
)
def test_the_largest_batch_that_fits_takes_the_same_steps(inputs, tmp_path, keys):
    def set_up(name, **sizes):
        cfg = load(inputs, tmp_path / name, **keys, **sizes, val_set_size=0, eval_steps=None, max_steps=2)
        trainer, model, tokenizer, _, _ = setup_model_and_trainer(cfg, load_datasets(cfg=cfg))
        return cfg, trainer, HFCausalTrainerBuilder(cfg, model, tokenizer)

    cfg, trainer, builder = set_up("found", micro_batch_size=1, gradient_accumulation_steps=8)
    tried = []

    def run_out(module, args, kwargs):
        tokens = kwargs["input_ids"].numel()
        tried.append(tokens)
        if tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = trainer.model.register_forward_pre_hook(run_out, with_kwargs=True)
    limit = 2 * 128
    builder.set_batch_size(trainer, builder.find_batch_size(trainer))
    hook.remove()
    assert (cfg.micro_batch_size, cfg.gradient_accumulation_steps) == (2, 4)
    assert max(tried) > limit
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    trainer.train()
    _, plain, _ = set_up("plain", micro_batch_size=2, gradient_accumulation_steps=4)
    plain.train()
    assert steps_of(trainer) == steps_of(plain)

    _, trainer, builder = set_up("none", micro_batch_size=1, gradient_accumulation_steps=2)
    limit = 0
    trainer.model.register_forward_pre_hook(run_out, with_kwargs=True)
    with pytest.raises(OutOfMemoryError, match="not even `micro_batch_size: 1` fits"):
        builder.find_batch_size(trainer)


@pytest.mark.parametrize("limit", range(9))
def test_bisection_finds_the_largest(limit):
    sizes = [1, 2, 4, 8]
    assert largest_that_fits(sizes, lambda size: size <= limit) == max([s for s in sizes if s <= limit], default=None)


SAVES = {"save_strategy": None, "save_steps": 2, "eval_steps": 2, "max_steps": 12, "num_epochs": 5}


def test_early_stopping_ends_with_the_best_checkpoint(inputs, tmp_path):
    # A rate at which the loss explodes: the first evaluation is the best one.
    cfg = load(inputs, tmp_path / "out", **SAVES, early_stopping_patience=2, learning_rate=1.0, lr_scheduler="constant")
    trainer = run(cfg)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert trainer.state.global_step == best + 4 < 12
    assert Path(trainer.state.best_model_checkpoint or "").name == f"checkpoint-{best}"
    # The run ends with that model, and it is what is saved.
    assert trainer.evaluate()["eval_loss"] == losses[best]
    metrics = evaluate(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    assert metrics["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_the_watchdog_stops_and_the_first_step_is_saved(inputs, tmp_path):
    cfg = load(
        inputs,
        tmp_path / "out",
        max_steps=10,
        save_first_step=True,
        loss_watchdog_threshold=0.001,
        loss_watchdog_patience=3,
        gc_steps=2,
        include_tokens_per_second=True,
    )
    trainer = run(cfg)
    assert trainer.state.global_step == 3
    assert (Path(cfg.output_dir) / "checkpoint-1" / "model.safetensors").is_file()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["tokens/per_sec_per_gpu"] > entry["tokens/train_per_sec_per_gpu"] > 0 for entry in logs)
    last = trainer.state.log_history[-1]
    assert last["train_tokens_per_second"] > 0
    assert trainer.args.torch_empty_cache_steps == 2


def test_without_include_tkps_no_rate_is_logged(inputs, tmp_path):
    trainer = run(load(inputs, tmp_path / "out", include_tkps=False))
    assert not any("tokens/per_sec_per_gpu" in entry for entry in trainer.state.log_history)


def test_the_profiler_records_the_steps_asked_for(inputs, tmp_path):
    cfg = load(inputs, tmp_path / "out", profiler_steps=2, profiler_steps_start=1, eval_steps=None, val_set_size=0)
    run(cfg)
    events = json.loads((Path(cfg.output_dir) / "profiler_trace.json").read_text())["traceEvents"]
    steps = [event for event in events if str(event.get("name")).startswith("Optimizer.step")]
    assert len(steps) == 2


def test_a_profile_that_cannot_be_written_does_not_end_the_run(inputs, tmp_path, caplog):
    cfg = load(inputs, tmp_path / "out", profiler_steps=1, eval_steps=None, val_set_size=0)
    (Path(cfg.output_dir) / "profiler_trace.json" / "taken").mkdir(parents=True)
    trainer = run(cfg)
    assert trainer.state.global_step == trainer.state.max_steps
    assert "The profile could not be written" in caplog.text


def test_a_profile_beyond_the_end_is_said(inputs, tmp_path, caplog):
    cfg = load(inputs, tmp_path / "out", profiler_steps=1, profiler_steps_start=50, eval_steps=None, val_set_size=0)
    run(cfg)
    assert "`profiler_steps_start: 50` lies beyond it" in caplog.text


class AsksForACheckpoint(TrainerCallback):
    """Touches the trigger file during a step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            Path(str(args.output_dir), "axolotl_checkpoint.save").touch()


def test_a_file_asks_for_a_checkpoint(inputs, tmp_path):
    cfg = load(inputs, tmp_path / "out", dynamic_checkpoint={"enabled": True, "check_interval": 3})
    trainer, _, _, _, _ = setup_model_and_trainer(cfg, load_datasets(cfg=cfg))
    trainer.add_callback(AsksForACheckpoint())
    trainer.train()
    assert [path.name for path in Path(cfg.output_dir).glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (Path(cfg.output_dir) / "axolotl_checkpoint.save").exists()
