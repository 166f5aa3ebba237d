"""`train` and `evaluate` as functions: what they leave on the disk, and how they end."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.core.checkpoint import check_checkpoint, find_last_whole_checkpoint
from axolotl.evaluate import evaluate
from axolotl.exceptions import CheckpointError, NotBuiltError, OutOfMemoryError, OutputError
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.run.signals import exit_if_signalled, restore_handlers, setup_signal_handler
from axolotl.train import train
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_base, make_tiny_llama


@pytest.fixture
def config(tmp_path):
    """A function that writes a config file and loads it."""
    make_tiny_base(tmp_path / "base")
    rng = random.Random(0)
    rows = [
        {"instruction": f"add {a} and {b}", "input": "", "output": f"{a + b}"}
        for a, b in [(rng.randint(0, 50), rng.randint(0, 50)) for _ in range(24)]
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def load(**keys):
        base = {
            "base_model": str(tmp_path / "base"),
            "datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "alpaca"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "val_set_size": 0.2,
            "sequence_len": 128,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 3,
            "num_epochs": 1,
            "learning_rate": 0.01,
            "optimizer": "adamw_torch",
            "lr_scheduler": "cosine",
            "warmup_steps": 1,
            "bf16": False,
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
        }
        merged = {key: value for key, value in {**base, **keys}.items() if value is not None}
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump(merged))
        return load_cfg(path)

    return load


def run(cfg):
    return train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))


LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


@pytest.mark.parametrize(
    "keys", [{}, LORA, {**LORA, "sample_packing": True, "bf16": True}], ids=["full", "lora", "packed"]
)
def test_a_run_leaves_everything_that_is_needed_to_use_and_repeat_it(config, tmp_path, keys):
    cfg = config(**keys, wandb_project=None, eval_strategy=None, eval_steps=2, save_strategy=None, save_steps=2)
    run(cfg)
    out = Path(cfg.output_dir)
    weights = "adapter_model.safetensors" if keys else "model.safetensors"
    for name in (weights, "tokenizer.json", "axolotl_config.yaml", "README.md", "report.html", "config.json"):
        assert (out / name).stat().st_size > 0, name
    assert yaml.safe_load((out / "axolotl_config.yaml").read_text())["learning_rate"] == 0.01
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"][0] == "axolotl"
    assert "evaluation loss" in card
    check_checkpoint(out / "checkpoint-2")
    metrics = evaluate(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    rows = {row["metric"]: row for row in csv.DictReader((out / "eval_summary.csv").open())}
    assert float(rows["loss"]["validation"]) == metrics["eval_loss"]
    # What is evaluated is the trained result, not the base model.
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    before = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert metrics["eval_loss"] < before


def test_the_chat_template_stands_where_the_config_says(config):
    cfg = config(tokenizer_save_jinja_files=False, wandb_project=None)
    run(cfg)
    for folder in (Path(cfg.output_dir), *Path(cfg.output_dir).glob("checkpoint-*")):
        assert not (folder / "chat_template.jinja").exists()
        assert "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())


def test_secrets_are_not_saved(config):
    cfg = config()
    cfg["comet_api_key"] = "very-secret"
    run(cfg)
    for path in Path(cfg.output_dir).rglob("*"):
        if path.is_file() and path.name != "debug.log":
            assert b"very-secret" not in path.read_bytes(), path


def test_the_pickled_arguments_hold_no_secret(config, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "value-of-some-key")

    class Secretive(BasePlugin):
        def get_training_args(self, cfg):
            return {
                "hub_token": "hf_" + "x" * 30,
                "hub_revision": "https://me:password-of-me@host/x",
                "run_name": "with value-of-some-key",
                "lr_scheduler_kwargs": {"num_cycles": 0.5},
            }

    manager = PluginManager.get_instance()
    monkeypatch.setitem(manager.plugins, "secretive", Secretive())
    cfg = config(save_strategy=None, save_steps=2)
    _, _, trainer = run(cfg)
    assert trainer.args.hub_token == "hf_" + "x" * 30
    saved = list(Path(cfg.output_dir).rglob("training_args.bin"))
    assert len(saved) == 3  # two checkpoints and the model
    for path in saved:
        args = torch.load(path, weights_only=False)
        assert args.lr_scheduler_kwargs == {"num_cycles": 0.5}
        assert args.learning_rate == 0.01
        for secret in (b"hf_xxx", b"password-of-me", b"value-of-some-key"):
            assert secret not in path.read_bytes(), secret


def test_resuming_by_key_goes_on(config):
    run(config(max_steps=2, save_strategy=None, save_steps=1))
    cfg = config(max_steps=4, save_strategy=None, save_steps=1, auto_resume_from_checkpoints=True)
    _, _, trainer = run(cfg)
    assert trainer._initial_global_step == 2
    assert trainer.state.global_step == 4


def test_a_checkpoint_that_is_not_there_is_an_error_before_the_model_is_loaded(config):
    cfg = config(resume_from_checkpoint="/nowhere/checkpoint-7")
    cfg["base_model"] = "/nowhere/at/all"
    with pytest.raises(CheckpointError, match="/nowhere/checkpoint-7"):
        train(cfg=cfg, dataset_meta=None)


def test_an_output_dir_that_cannot_be_written_is_an_error_before_the_model_is_loaded(config, tmp_path):
    (tmp_path / "file").write_text("")
    cfg = config()
    cfg["output_dir"] = str(tmp_path / "file" / "out")
    cfg["base_model"] = "/nowhere/at/all"
    with pytest.raises(OutputError, match="cannot be written"):
        train(cfg=cfg, dataset_meta=None)


class Interfere(BasePlugin):
    """Adds a callback that the test gives."""

    callback: TrainerCallback | None = None

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [self.callback]


@pytest.fixture
def interfere():
    manager = PluginManager.get_instance()
    before = dict(manager.plugins)
    plugin = Interfere()

    def add(callback):
        plugin.callback = callback
        manager.plugins["interfere"] = plugin

    yield add
    manager.plugins.clear()
    manager.plugins.update(before)


def test_an_adapter_keeps_its_config_until_there_is_another(config, interfere):
    """`lora_alpha` of a run that dies must not scale the adapter that was there before."""

    class Dies(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise RuntimeError("died")

    cfg = config(**LORA, wandb_project=None)
    run(cfg)
    interfere(Dies())
    with pytest.raises(RuntimeError, match="died"):
        run(config(**{**LORA, "lora_alpha": 64}, wandb_project=None))
    assert json.loads((Path(cfg.output_dir) / "adapter_config.json").read_text())["lora_alpha"] == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_with_its_code(config, interfere, number):
    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), number)

    cfg = config(max_steps=50)
    inherited = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests in the background may ignore it
    interfere(Signal())
    try:
        with pytest.raises(SystemExit) as exit_info:
            run(cfg)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, inherited)
    assert exit_info.value.code == 128 + number
    last = find_last_whole_checkpoint(cfg.output_dir)
    assert last is not None
    assert last.name == "checkpoint-2"
    assert (Path(cfg.output_dir) / "model.safetensors").is_file()
    assert (Path(cfg.output_dir) / "report.html").is_file()


def test_a_signal_also_ends_a_trainer_that_is_not_ours(tmp_path):
    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGUSR1)

    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 8
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=1)
    trainer = Trainer(make_tiny_llama(tmp_path / "model"), args, train_dataset=Dataset.from_list(rows))
    trainer.add_callback(Signal())
    handlers = setup_signal_handler(DictDefault(output_dir=str(tmp_path)), trainer)
    try:
        trainer.train()
        with pytest.raises(SystemExit) as exit_info:
            exit_if_signalled(DictDefault(output_dir=str(tmp_path)), trainer)
    finally:
        restore_handlers(handlers)
    assert exit_info.value.code == 128 + signal.SIGUSR1
    assert find_last_whole_checkpoint(str(tmp_path)).name == "checkpoint-2"


def test_out_of_memory_names_the_keys_to_change(config, interfere):
    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    interfere(Full())
    with pytest.raises(OutOfMemoryError, match=r"micro_batch_size: 1.*gradient_checkpointing: true.*Tried to allocate"):
        run(config())


def test_rl_is_refused(config):
    cfg = config()
    cfg["rl"] = "dpo"
    with pytest.raises(NotBuiltError):
        run(cfg)
