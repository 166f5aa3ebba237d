"""Every kind of adapter, trained from a YAML file: what is saved loads again, resumes exactly and merges into equal logits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from axolotl.cli.config import load_cfg
from axolotl.cli.merge_lora import do_cli as merge_lora
from axolotl.common.datasets import load_datasets
from axolotl.exceptions import ConfigError, ModelError
from axolotl.loaders import ModelLoader, load_tokenizer
from axolotl.loaders.quantization import count_parameters
from axolotl.train import setup_model_and_trainer, train
from axolotl.utils.distributed import gather_from_all_ranks
from tests.integration.training_runs import run_on_ranks
from tests.tiny import make_tiny_base

IDS = torch.arange(5, 53).reshape(2, 24)
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
}
BASES = {
    "llama": ("llama", {"hidden_size": 64, "intermediate_size": 128}),
    "qwen2": ("qwen2", {"hidden_size": 64, "intermediate_size": 128}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "deep": ("llama", {"num_hidden_layers": 4}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}),
    "moe": (
        "Qwen3MoeConfig",
        {
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "decoder_sparse_step": 1,
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Base models, made when a test asks for them, and rows that all tests share."""
    root = tmp_path_factory.mktemp("adapters")
    rng = random.Random(0)
    numbers = [(rng.randint(0, 50), rng.randint(0, 50)) for _ in range(16)]
    rows = [{"instruction": f"add {a} and {b}", "input": "", "output": f"{a + b}"} for a, b in numbers]
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


@pytest.fixture
def config(folder, tmp_path):
    """A function that writes a config file."""

    def write(base: str = "llama", **keys) -> Path:
        if not (folder / base).is_dir():
            architecture, shape = BASES[base]
            make_tiny_base(folder / base, architecture, **shape)
        written = {
            "base_model": str(folder / base),
            "datasets": [{"path": str(folder / "rows.jsonl"), "type": "alpaca"}],
            "dataset_prepared_path": str(folder / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "val_set_size": 0,
            "sequence_len": 128,
            "micro_batch_size": 2,
            "max_steps": 3,
            "learning_rate": 0.02,
            "optimizer": "adamw_torch",
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "bf16": False,
            "logging_steps": 1,
            "save_strategy": "no",
            **keys,
        }
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump({key: value for key, value in written.items() if value is not None}))
        return path

    return write


def run(path: Path):
    """(model, losses, cfg) of a training."""
    cfg = load_cfg(path)
    model, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], cfg


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def plain(folder: Path, **keywords):
    return AutoModelForCausalLM.from_pretrained(folder, **keywords)


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)  # logits of a few units, after several merges


# Name -> (base, keys).
KINDS = {
    "lora": ("llama", {}),
    "dora": ("llama", {"peft_use_dora": True}),
    "rslora": ("llama", {"peft_use_rslora": True}),
    "gaussian": ("llama", {"peft_init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"peft_init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"peft_init_lora_weights": "mica"}),
    "not a no-op": ("llama", {"peft_init_lora_weights": False}),
    "pissa": ("llama", {"peft_init_lora_weights": "pissa"}),
    "pissa by iteration": ("llama", {"peft_init_lora_weights": "pissa_niter_2"}),
    "pissa with everything": (
        "llama",
        {
            "peft_init_lora_weights": "pissa_niter_2",
            "peft_use_dora": True,
            "peft_use_rslora": True,
            "lora_rank_pattern": {"q_proj": 2},
            "lora_alpha_pattern": {"v_proj": 32},
            "lora_modules_to_save": ["lm_head"],
            "peft_trainable_token_indices": [7],
        },
    ),
    "pissa beside embeddings": (
        "llama",
        {"peft_init_lora_weights": "pissa", "lora_target_modules": ["q_proj", "embed_tokens"]},
    ),
    "pissa, Conv1D": (
        "gpt2",
        {"peft_init_lora_weights": "pissa", "lora_target_modules": ["c_attn", "c_proj"], "lora_fan_in_fan_out": True},
    ),
    "olora": ("llama", {"peft_init_lora_weights": "olora"}),
    "eva": ("llama", {"peft_init_lora_weights": "eva", "lora_rank_pattern": {"v_proj": 2}}),
    "eva with everything": (
        "llama",
        {
            "peft_init_lora_weights": "eva",
            "peft_use_dora": True,
            "peft_use_rslora": True,
            "lora_modules_to_save": ["lm_head"],
            "peft_trainable_token_indices": [7],
            "gradient_checkpointing": True,
        },
    ),
    "eva, Conv1D": (
        "gpt2",
        {"peft_init_lora_weights": "eva", "lora_target_modules": ["c_attn", "c_proj"], "lora_fan_in_fan_out": True},
    ),
    "corda": ("llama", {"peft_init_lora_weights": "corda"}),
    "corda, packed": (
        "llama",
        {"peft_init_lora_weights": "corda", "sample_packing": True, "lora_target_modules": ["q_proj", "embed_tokens"]},
    ),
    "corda, Conv1D": (
        "gpt2",
        {"peft_init_lora_weights": "corda", "lora_target_modules": ["c_attn", "c_proj"], "lora_fan_in_fan_out": True},
    ),
    "lora_ga": ("llama", {"peft_init_lora_weights": "lora_ga"}),
    "lora_ga with everything": (
        "llama",
        {
            "peft_init_lora_weights": "lora_ga",
            "peft_use_dora": True,
            "peft_use_rslora": True,
            "lora_rank_pattern": {"q_proj": 2},
            "lora_modules_to_save": ["lm_head"],
            "gradient_checkpointing": True,
        },
    ),
    "lora_ga, Conv1D": (
        "gpt2",
        {"peft_init_lora_weights": "lora_ga", "lora_target_modules": ["c_attn", "c_proj"], "lora_fan_in_fan_out": True},
    ),
    "patterns": ("llama", {"lora_rank_pattern": {"q_proj": 2}, "lora_alpha_pattern": {"v_proj": 32}}),
    "some layers": ("llama", {"peft_layers_to_transform": [1]}),
    "the first layer": ("llama", {"peft_layers_to_transform": 0, "peft_layers_pattern": "layers"}),
    "replicated layers": ("llama", {"peft_layer_replication": [[0, 2], [1, 2]]}),
    "token rows": ("llama", {"peft_trainable_token_indices": [7, 8]}),
    "token rows by name": ("llama", {"peft_trainable_token_indices": {"embed_tokens": [7], "lm_head": [8]}}),
    "token rows, tied": ("tied", {"peft_trainable_token_indices": [7, 8], "peft_ensure_weight_tying": True}),
    "tied pair": ("tied", {"lora_target_modules": ["q_proj", "embed_tokens"], "peft_ensure_weight_tying": True}),
    "saved modules": ("llama", {"lora_modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved modules, tied": ("tied", {"lora_modules_to_save": ["embed_tokens"], "peft_ensure_weight_tying": True}),
    "new tokens": ("llama", {"lora_modules_to_save": ["embed_tokens", "lm_head"], "tokens": ["<a>", "<b>"]}),
    "new tokens by rows": ("llama", {"peft_trainable_token_indices": [384, 385], "tokens": ["<a>", "<b>"]}),
    "Conv1D": ("gpt2", {"lora_target_modules": ["c_attn", "c_proj"], "lora_fan_in_fan_out": True}),
    "experts": (
        "moe",
        {
            "lora_target_modules": ["q_proj"],
            "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "excluded": (
        "llama",
        {"lora_target_modules": None, "lora_target_linear": True, "lora_exclude_modules": ["k_proj"]},
    ),
    "on the CPU, as loaded": ("llama", {"lora_on_cpu": True, "peft_autocast_adapter_dtype": False}),
    "noise": ("llama", {"neftune_noise_alpha": 5}),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_trained_loads_and_merges_into_the_same_model(name, config, tmp_path):
    base, keys = KINDS[name]
    path = config(base, **{**LORA, **keys})
    model, losses, cfg = run(path)
    expected = logits(model)
    assert losses[-1] != losses[0]
    start = plain(cfg.base_model)
    if keys.get("tokens"):
        start.resize_token_embeddings(model.config.vocab_size, mean_resizing=False)
    before = logits(start)
    # peft alone, without anything of ours, gets the same model from the files.
    assert_same(logits(PeftModel.from_pretrained(start, cfg.output_dir)), expected)
    merge_lora(path)
    assert_same(logits(plain(tmp_path / "out" / "merged")), expected)
    assert (expected - before).abs().max() > 1e-2 or base == "moe"


@pytest.mark.parametrize("keys", [{}, {"peft_use_dora": True}], ids=["lora", "dora"])
def test_a_four_bit_base_merges_into_what_was_trained(keys, config, tmp_path):
    pytest.importorskip("bitsandbytes")
    path = config(**{**LORA, **keys, "adapter": "qlora", "load_in_4bit": True})
    model, _, _ = run(path)
    assert count_parameters(model) == model.get_nb_trainable_parameters()
    merge_lora(path)
    assert_same(logits(plain(tmp_path / "out" / "merged")), logits(model))


def test_an_eight_bit_base_merges_into_what_was_trained(config, tmp_path):
    pytest.importorskip("bitsandbytes")
    path = config(**{**LORA, "load_in_8bit": True})
    model, _, cfg = run(path)
    expected = logits(model)
    merge_lora(path)
    merged = plain(tmp_path / "out" / "merged")
    merge_lora(path, dequant=True)
    unrounded = plain(tmp_path / "out" / "merged")
    # What is left is the rounding of inputs, which no weight can stand for.
    assert (logits(merged) - expected).norm() < (logits(unrounded) - expected).norm()
    name = "model.layers.0.self_attn.k_proj.weight"
    base = plain(cfg.base_model).state_dict()[name]
    assert torch.equal(unrounded.state_dict()[name], base)
    steps = base.abs().amax(dim=1, keepdim=True) / 127
    assert 0 < (merged.state_dict()[name] - base).abs().div(steps).max() < 0.6


def test_evaluating_leaves_the_training_of_a_four_bit_base_alone(config):
    """bitsandbytes packs weights anew on some CPUs when it first evaluates; no gradient passed through these."""
    pytest.importorskip("bitsandbytes")
    keys = {**LORA, "adapter": "qlora", "load_in_4bit": True, "val_set_size": 4, "max_steps": 4}
    _, without, _ = run(config(**keys, eval_strategy="no"))
    _, evaluated, _ = run(config(**keys, eval_strategy="steps", eval_steps=1))
    assert evaluated == without


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_loads_and_merges_on_the_rounded_base(bits, config, tmp_path):
    pytest.importorskip("bitsandbytes")
    path = config(**LORA, peft={"loftq_config": {"loftq_bits": bits}})
    model, _, cfg = run(path)
    expected = logits(model)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["init_lora_weights"], written["loftq_config"]["loftq_bits"]) == ("loftq", bits)
    cfg.lora_model_dir = cfg.output_dir
    again, _ = ModelLoader(cfg, load_tokenizer(cfg), inference=True).load()
    assert_same(logits(again), expected)
    merge_lora(path)
    assert_same(logits(plain(tmp_path / "out" / "merged")), expected)


@pytest.mark.parametrize(
    "keys",
    [
        {"peft_init_lora_weights": "pissa_niter_2"},
        {"peft_init_lora_weights": "olora", "peft_use_dora": True},
        {"peft_init_lora_weights": "eva", "lora_rank_pattern": {"v_proj": 2}},
        {"peft_init_lora_weights": "corda", "peft_use_dora": True, "lora_rank_pattern": {"v_proj": 2}},
        {"peft_init_lora_weights": "lora_ga", "sample_packing": True, "bf16": True, "gradient_checkpointing": True},
        {"peft": {"loftq_config": {"loftq_bits": 4}}},
        {"peft_layer_replication": [[0, 2], [1, 2]]},
        {"neftune_noise_alpha": 5},
    ],
    ids=["pissa", "olora", "eva", "corda", "lora_ga", "loftq", "replicated", "noise"],
)
def test_a_resumed_adapter_goes_on_bit_for_bit(keys, config, tmp_path):
    if "peft" in keys:
        pytest.importorskip("bitsandbytes")
    path = config(**LORA, **keys, max_steps=4, save_strategy="steps", save_steps=2)
    model, losses, _ = run(path)
    path = config(
        **LORA,
        **keys,
        max_steps=4,
        save_strategy="no",
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"),
    )
    again, resumed, _ = run(path)
    assert resumed == losses
    assert torch.equal(logits(again), logits(model))


def start_on_a_rank(folder: Path) -> dict[str, list]:
    """What the first layer starts from, by method: sums that differ when a single bit does."""
    found = {}
    for method in ("eva", "corda", "lora_ga"):
        cfg = load_cfg(
            folder.parent / "config.yml", peft_init_lora_weights=method, output_dir=str(folder.parent / "out")
        )
        trainer, *_ = setup_model_and_trainer(cfg, load_datasets(cfg=cfg))
        weights = {name: value for name, value in trainer.model.state_dict().items() if "layers.0" in name}
        sums = [value.double().sum().item() for value in weights.values()]
        every = gather_from_all_ranks(lambda sums=sums: sums)
        assert every is None or all(one == sums for one in every)
        found[method] = sums
    return found


def test_data_driven_starts_are_the_same_on_two_ranks(config, tmp_path):
    path = config(**LORA, sample_packing=True)
    alone = start_on_a_rank(tmp_path / "alone")
    together = run_on_ranks(start_on_a_rank, path.parent)
    assert together == alone


def test_pissa_from_another_start_resumes_on_the_checkpoints_base(config, tmp_path):
    keys = {**LORA, "peft_init_lora_weights": "pissa_niter_0", "max_steps": 2, "save_strategy": "steps"}
    model, _, _ = run(config(**keys, save_steps=1))
    path = config(**keys, save_steps=9, seed=7, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    again, _, _ = run(path)
    assert_same(logits(again), logits(model))


def test_a_trained_adapter_is_the_start_of_another_run(config, tmp_path):
    first, _, cfg = run(config(**LORA, peft_init_lora_weights="pissa"))
    before = logits(first)
    model, _, _ = run(
        config(**LORA, lora_model_dir=cfg.output_dir, output_dir=str(tmp_path / "second"), learning_rate=1e-9)
    )
    assert_same(logits(model), before)


def test_llama_adapter(config, tmp_path):
    path = config(adapter="llama-adapter", peft_adapter={"layers": 1, "len": 4})
    model, losses, cfg = run(path)
    assert losses[-1] != losses[0]
    assert torch.equal(logits(PeftModel.from_pretrained(plain(cfg.base_model), cfg.output_dir)), logits(model))
    with pytest.raises(ModelError, match="ADAPTION_PROMPT"):
        merge_lora(path)


# --- the base model ---------------------------------------------------------------------------------------------------


def test_another_family_of_the_same_shape_is_refused_by_name(config, folder, tmp_path):
    keys = {**LORA, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    run(config(**keys))
    out = str(tmp_path / "out")
    other = {**keys, "output_dir": str(tmp_path / "other")}
    for path in (
        config("qwen2", **{**other, "resume_from_checkpoint": f"{out}/checkpoint-1"}),
        config("qwen2", **{**other, "lora_model_dir": out}),
    ):
        with pytest.raises(ModelError, match=r"`model_type` is llama .* but qwen2 here"):
            run(path)
    with pytest.raises(ModelError, match=r"`model_type` is llama .* but qwen2 here"):
        merge_lora(config("qwen2", **{**other, "lora_model_dir": f"{out}/checkpoint-1"}))
    # Only the name of the base is left in a bare adapter.
    for name in ("config.json", "checkpoint-1/config.json"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(ModelError, match=r"`model_type` is llama .* but qwen2 here"):
        merge_lora(config("qwen2", **{**other, "lora_model_dir": out}))


# --- ReLoRA -----------------------------------------------------------------------------------------------------------

RELORA = {
    **LORA,
    "relora": True,
    "jagged_restart_steps": 2,
    "jagged_restart_warmup_steps": 1,
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 9,
}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"relora_prune_method": "random", "lora_modules_to_save": ["lm_head"]},
        {"relora_prune_method": "reset", "relora_cpu_offload": True, "peft_use_dora": True},
        {"adapter": "qlora", "load_in_4bit": True, "optimizer": "adamw_bnb_8bit"},
    ],
    ids=["magnitude", "random", "reset, dora", "four bits"],
)
def test_relora_merges_restarts_and_resumes(keys, config, tmp_path):
    if "load_in_4bit" in keys:
        pytest.importorskip("bitsandbytes")
    path = config(**{**RELORA, **keys})
    model, losses, cfg = run(path)
    expected = logits(model)
    out = tmp_path / "out"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["num_lora_restarts"] for entry in history if "loss" in entry] == [0, 0, 1, 1, 2]
    # The base of the last restart is a model by itself, and the adapter belongs to it.
    change = logits(plain(out / "relora")) - logits(plain(cfg.base_model))
    assert change.abs().max() > 1e-2
    if "load_in_4bit" not in keys:
        assert_same(logits(AutoPeftModelForCausalLM.from_pretrained(out)), expected)
        assert_same(logits(AutoPeftModelForCausalLM.from_pretrained(out / "checkpoint-5")), expected)
    assert not (out / "checkpoint-2" / "relora").exists()
    assert (out / "checkpoint-3" / "relora" / "model.safetensors").is_file()
    merge_lora(path)
    assert_same(logits(plain(out / "merged")), expected)
    for step in (2, 3):
        again, resumed, _ = run(config(**{**RELORA, **keys}, resume_from_checkpoint=str(out / f"checkpoint-{step}")))
        assert resumed == losses, step
        assert torch.equal(logits(again), expected), step


def test_an_adapter_after_a_relora_run_in_the_same_folder_keeps_its_base(config, tmp_path):
    run(config(**RELORA))
    path = config(**LORA)
    model, _, _ = run(path)
    assert (tmp_path / "out/relora").is_dir()
    merge_lora(path)
    assert_same(logits(plain(tmp_path / "out" / "merged")), logits(model))


# --- layers and rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, LORA, {"optimizer": "adamw_torch_fused", "gradient_checkpointing": True}])
def test_lisa_trains_some_layers_at_a_time_and_resumes(keys, config, tmp_path):
    keys = {**keys, "lisa_n_layers": 2, "lisa_step_interval": 3, "max_steps": 5, "learning_rate": 0.005}
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    model, losses, _ = run(config("deep", **keys, **saving))
    weights = model.state_dict()
    assert losses[-1] != losses[0]
    for step in (1, 2, 4):
        checkpoint = str(tmp_path / "out" / f"checkpoint-{step}")
        again, resumed, _ = run(config("deep", **keys, resume_from_checkpoint=checkpoint))
        assert resumed == losses, step
        assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items()), step


def test_lisa_changes_only_the_layers_of_the_draw(config):
    keys = {"lisa_n_layers": 1, "lisa_step_interval": 9, "max_steps": 1}
    model, _, cfg = run(config("deep", **keys))
    before = plain(cfg.base_model).state_dict()
    changed = {
        name.split(".")[2]
        for name, value in model.state_dict().items()
        if ".layers." in name and not torch.equal(value, before[name])
    }
    assert len(changed) == 1
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_lisa_draws_among_the_layers_that_train(config):
    keys = {"lisa_step_interval": 1, "unfrozen_parameters": ["layers.1.mlp", "layers.3.mlp"], "max_steps": 3}
    model, _, cfg = run(config("deep", lisa_n_layers=1, **keys))
    before = plain(cfg.base_model).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".1.mlp" in name or ".3.mlp" in name for name in changed)
    with pytest.raises(ConfigError, match=r"more than the 2 layers that are not frozen from the start, as 2 are"):
        run(config("deep", lisa_n_layers=3, **keys))


@pytest.mark.parametrize("optimizer", ["adamw_torch", "schedule_free_adamw", "muon"])
def test_only_the_rows_of_a_range_change_even_with_weight_decay(optimizer, config):
    if optimizer.startswith("schedule_free"):
        pytest.importorskip("schedulefree")
    keys = {"unfrozen_parameters": ["^model.embed_tokens.weight$[:40]", "layers.1.mlp"], "weight_decay": 0.5}
    model, _, cfg = run(config(**keys, optimizer=optimizer))
    before = plain(cfg.base_model).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"model.embed_tokens.weight"} | {
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "gate", "down")
    }
    rows = (model.model.embed_tokens.weight != before["model.embed_tokens.weight"]).any(dim=1).nonzero()
    assert len(rows) > 0
    assert int(rows.max()) < 40


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_init_lora_weights": "pisa"}, "Did you mean `pissa`"),
        ({"peft_init_lora_weights": "eva", "rl": "dpo"}, "prepared rows"),
        ({"peft_init_lora_weights": "corda", "adapter": "qlora", "load_in_4bit": True}, "unquantized weights"),
        ({"peft_init_lora_weights": "pissa", "adapter": "qlora", "load_in_4bit": True}, "unquantized weights"),
        ({"peft_init_lora_weights": "orthogonal", "lora_r": 3}, "even ranks"),
        ({"peft": {"loftq_config": {"loftq_bits": 3}}}, "not 4 or 8"),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}, "load_in_8bit": True}, "rounds the weights by itself"),
        ({"lisa_n_layers": 2}, "lisa_step_interval"),
        ({"relora": True}, "jagged_restart_steps"),
        ({**RELORA, "peft_init_lora_weights": "pissa"}, "restart"),
        ({"adapter": "lora", "peft_adapter": {"len": 3}}, "llama-adapter"),
        ({"adapter": "llama-adapter", "load_in_8bit": True}, "unquantized model"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(keys, message, config):
    with pytest.raises(ConfigError, match=message):
        load_cfg(config(**{**LORA, **keys}))


# --- embeddings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["llama", "tied"])
@pytest.mark.parametrize("kept", ["nothing", "modules", "rows"])
def test_fixed_tokens_get_the_mean_where_it_is_saved(base, kept, config):
    keys = {"fix_untrained_tokens": [40], "max_steps": 1, "learning_rate": 1e-12}
    if kept != "nothing":
        keys |= LORA
    if kept == "modules":
        keys["lora_modules_to_save"] = ["embed_tokens", "lm_head"]
    if kept == "rows":
        keys["peft_trainable_token_indices"] = [40] if base == "tied" else {"embed_tokens": [40], "lm_head": [40]}
    model, _, cfg = run(config(base, **keys))
    expected = plain(cfg.base_model)
    others = torch.arange(384) != 40
    with torch.no_grad():
        for weight in {id(w): w for w in (expected.lm_head.weight, expected.model.embed_tokens.weight)}.values():
            weight[40] = weight[others].mean(dim=0)
    assert_same(logits(model), logits(expected))


def test_fixed_tokens_that_an_adapter_would_lose_are_refused(config):
    with pytest.raises(ConfigError, match="the adapter does not save"):
        run(config(**LORA, fix_untrained_tokens=40))


@pytest.mark.parametrize("keys", [{}, LORA, {**LORA, "lora_modules_to_save": ["embed_tokens"]}])
def test_noise_on_embeddings_is_uniform_while_training_and_absent_otherwise(keys, config):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            embedding = model.get_input_embeddings()
            training = model.training
            for mode in (True, False):
                model.train(mode)
                clean = torch.nn.functional.embedding(IDS, weight_of(embedding))
                seen.append((mode, (embedding(IDS) - clean).detach()))
            model.train(training)

    def weight_of(module):
        return module.modules_to_save["default"].weight if hasattr(module, "modules_to_save") else module.weight

    cfg = load_cfg(config(**keys, neftune_noise_alpha=5, max_steps=2))
    trainer, *_ = setup_model_and_trainer(cfg, load_datasets(cfg=cfg))
    trainer.add_callback(Watch())
    trainer.train()
    bound = 5 / (IDS.shape[1] * 64) ** 0.5
    for training, noise in seen:
        if not training:
            assert noise.abs().max() == 0
            continue
        assert 0.95 * bound < noise.abs().max() <= bound + 1e-6
        # A uniform variable on [-b, b] has the variance b^2 / 3.
        assert abs(noise.var().item() / (bound**2 / 3) - 1) < 0.1
    # The hook is gone afterwards.
    trainer.model.train()
    embedding = trainer.model.get_input_embeddings()
    assert torch.equal(embedding(IDS), torch.nn.functional.embedding(IDS, weight_of(embedding)))


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"overrides_of_model_config": {"num_hidden_layers": "many"}}, "overrides_of_model_config"),
        ({"overrides_of_model_config": {"hidden_size": 48}}, "weights of other shapes"),
        ({"overrides_of_model_kwargs": {"foo_bar": 1}}, "overrides_of_model_kwargs"),
        ({"max_memory": {"cpu": "lots"}}, "is no size"),
        ({"gpu_memory_limit": "much"}, "is no size"),
        ({"load_in_8bit": True, "bnb_config_kwargs": {"foo": 1}}, "is not an option of BitsAndBytesConfig"),
        (
            {"load_in_4bit": True, "adapter": "qlora", "bnb_config_kwargs": {"bnb_4bit_compute_dtype": "x"}},
            "cannot be used",
        ),
        ({"model_quantization_config": "Mxfp4Config", "model_quantization_config_kwargs": {"foo": 1}}, "Mxfp4Config"),
        ({"peft_trainable_token_indices": [99999]}, "rows 0 to 383"),
        ({"peft_layers_to_transform": [9]}, "layers 0 to 1"),
        ({"peft_layer_replication": [[0, 9]]}, "no range of the 2 layers"),
    ],
)
def test_a_wrong_value_is_named(keys, message, config):
    if "bnb_config_kwargs" in keys:
        pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match=message):
        cfg = load_cfg(config(**{**LORA, **keys}))
        ModelLoader(cfg, load_tokenizer(cfg)).load()


def test_arguments_of_from_pretrained_and_fields_of_the_config_reach_the_model(config):
    keys = {
        "overrides_of_model_kwargs": {"torch_dtype": "bfloat16", "output_hidden_states": True},
        "overrides_of_model_config": {"attention_dropout": 0.25},
        "max_memory": {"cpu": "4GiB"},
        "low_cpu_mem_usage": True,
    }
    cfg = load_cfg(config(**keys))
    model, _ = ModelLoader(cfg, load_tokenizer(cfg)).load()
    assert model.dtype == torch.bfloat16
    assert model.config.output_hidden_states is True
    assert model.model.layers[0].self_attn.attention_dropout == 0.25
