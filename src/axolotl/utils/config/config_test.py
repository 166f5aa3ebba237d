"""From a config as written to one that is ready to run."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import LlamaConfig

from axolotl.exceptions import ConfigError
from axolotl.utils.config import machine, normalize_cfg_datasets, normalize_config, validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig

CONFIG = {
    "base_model": "x",
    "learning_rate": "2e-4",
    "datasets": [{"path": "a.jsonl", "type": "alpaca"}],
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 3,
}


@pytest.fixture
def base_model(tmp_path):
    LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    ).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", *machine.ACCELERATE_PLACES):
        monkeypatch.delenv(name, raising=False)


def resolved(base_model, **config) -> DictDefault:
    cfg = validate_config(DictDefault({**CONFIG, "base_model": base_model, **config}))
    normalize_config(cfg)
    normalize_cfg_datasets(cfg)
    return cfg


def reason(cfg: DictDefault, key: str) -> str:
    return {entry["key"]: entry["reason"] for entry in cfg.resolution}[key]


class TestValidate:
    def test_types_defaults_and_choices(self):
        cfg = validate_config(DictDefault(CONFIG))
        assert cfg.learning_rate == 2e-4
        assert cfg.sequence_len == 512 and cfg.lr_scheduler == "cosine"
        assert cfg.seed == 42 and reason(cfg, "seed")
        assert "wandb_project" not in cfg and cfg.wandb_project is None

    def test_paths_of_the_home_folder(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")
        paths = {"base_model": "~/base", "output_dir": "~/runs/1", "dataset_prepared_path": "~prep"}
        cfg = validate_config(DictDefault({**CONFIG, **paths}))
        assert cfg.base_model == "/home/me/base" and cfg.output_dir == "/home/me/runs/1"
        assert cfg.dataset_prepared_path == "~prep"

    def test_what_is_written_stays_as_it_was(self):
        written = DictDefault(CONFIG)
        validate_config(written)
        assert written == CONFIG

    def test_a_plain_dict_is_a_config(self):
        assert validate_config(dict(CONFIG)).micro_batch_size == 2

    def test_all_problems_at_once_each_once(self):
        with pytest.raises(ConfigError) as error:
            validate_config(
                DictDefault(
                    {
                        **CONFIG,
                        "micro_batch_size": "two",
                        "learning_rate": None,
                        "sample_packng": True,
                        "load_in_8bit": True,
                        "unsloth_rope": True,
                        "deepspeed": "zero3.json",
                    }
                )
            )
        problems = error.value.problems
        assert len(problems) == len(set(problems)) == 6
        for key in ("micro_batch_size", "learning_rate", "sample_packng", "load_in_8bit", "unsloth_rope", "deepspeed"):
            assert sum(f"`{key}" in problem for problem in problems) == 1, key

    def test_a_missing_required_key_is_the_only_problem(self):
        config = {key: value for key, value in CONFIG.items() if key != "base_model"}
        with pytest.raises(ConfigError) as error:
            validate_config(DictDefault(config))
        assert len(error.value.problems) == 1 and "base_model" in str(error.value)

    def test_older_names_and_quoted_values_reach_the_checks(self):
        with pytest.raises(ConfigError, match="warmup_steps and warmup_ratio"):
            validate_config(DictDefault({**CONFIG, "warmup_steps": "5", "warmup_ratio": "0.1"}))
        cfg = validate_config(DictDefault({**CONFIG, "sample_packing": "true", "epochs": 2, "flash_attention": True}))
        assert cfg.pad_to_sequence_len is True and cfg.num_epochs == 2
        assert cfg.attn_implementation == "flash_attention_2" and cfg.flash_attention is None

    def test_rules_of_the_machine_need_its_facts(self):
        config = DictDefault({**CONFIG, "flex_attention": True})
        validate_config(config)
        with pytest.raises(ConfigError, match="Flex attention is not supported on torch version"):
            validate_config(config, {"n_gpu": 1}, {"torch_version": "2.5.1"})
        with pytest.raises(ConfigError, match="Flex attention"):
            validate_config(config, env_capabilities={"torch_version": "2.5.1"})

    def test_capabilities_stay_in_the_config(self):
        cfg = validate_config(DictDefault(CONFIG), {"bf16": True, "n_gpu": 2, "compute_capability": "sm_90"})
        assert cfg.capabilities.compute_capability == "sm_90" and cfg.dataloader_num_workers == 2

    def test_a_config_can_be_validated_again(self, base_model):
        once = validate_config(DictDefault({**CONFIG, "sample_packing": True}))
        assert validate_config(once) == once
        cfg = resolved(
            base_model,
            saves_per_epoch=3,
            evals_per_epoch=1,
            val_set_size=0.1,
            batch_size=8,
            gradient_accumulation_steps=None,
        )
        again = validate_config(cfg)
        normalize_config(again)
        changed = {key for key in {*cfg, *again} if cfg[key] != again[key]} - {"resolution"}
        assert not changed


ODD_VALUES = (None, True, False, 0, 1, -1, 0.5, "", "x", "true", "1e-3", [], {}, [None], [{}], {"a": 1}, {1: 2}, (1,), b"x",
              float("nan"), 10**30, "auto", "lora", "dpo", "ebft", "best", {"fsdp_version": 2}, {"mode": "strided"})  # fmt: skip
MACHINES = (
    None,
    {"n_gpu": 0},
    {"n_gpu": 2, "n_node": 2, "compute_capability": "sm_90", "bf16": True, "fp8": True, "tf32": True},
)


@pytest.mark.parametrize("seed", range(200))
def test_whatever_is_written_is_checked_or_refused(seed):
    """No config, however odd, ends in anything but a checked config or a list of problems."""
    chance = random.Random(seed)
    keys = chance.sample(sorted(set(AxolotlInputConfig.model_fields) - set(CONFIG)), chance.choice((1, 3, 9)))
    cfg = DictDefault({**CONFIG, **{key: chance.choice(ODD_VALUES) for key in keys}})
    try:
        checked = validate_config(cfg, chance.choice(MACHINES), {"torch_version": chance.choice(("2.4.0", "2.13.0"))})
    except ConfigError as err:
        assert err.problems and all(isinstance(problem, str) and problem for problem in err.problems)
    else:
        assert validate_config(checked) == checked


class TestBatches:
    def test_micro_batches_from_a_batch_size(self, base_model):
        cfg = resolved(base_model, batch_size=8, gradient_accumulation_steps=None)
        assert (cfg.gradient_accumulation_steps, cfg.batch_size, cfg.eval_batch_size) == (4, 8, 2)

    def test_ranks_that_share_rows_count_once(self, base_model, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("LOCAL_RANK", "3")
        cfg = validate_config(DictDefault({**CONFIG, "base_model": base_model}))
        cfg.context_parallel_size = 2
        normalize_config(cfg)
        assert (cfg.world_size, cfg.local_rank, cfg.ddp) == (8, 3, True)
        assert cfg.batch_size == 2 * 3 * 4

    def test_saves_per_epoch(self, base_model):
        assert resolved(base_model, saves_per_epoch=2, num_epochs=2).save_steps == 0.25

    def test_one_save_in_the_run_is_not_a_save_at_every_step(self, base_model):
        cfg = resolved(base_model, saves_per_epoch=1)
        assert cfg.save_steps is None and cfg.save_strategy == "epoch"

    def test_evals_need_something_to_evaluate_on(self, base_model):
        assert resolved(base_model, evals_per_epoch=4).eval_steps is None
        assert resolved(base_model, evals_per_epoch=4, val_set_size=0.1).eval_steps == 0.25

    def test_twice_is_as_once(self, base_model):
        cfg = resolved(base_model, saves_per_epoch=3, gradient_checkpointing=True)
        before = {key: value for key, value in cfg.items() if key != "resolution"}
        normalize_config(cfg)
        assert {key: value for key, value in cfg.items() if key != "resolution"} == before


class TestNumberFormat:
    @pytest.mark.parametrize(
        ("device", "has_bf16", "config", "bf16", "fp16", "dtype"),
        [
            ("cuda:0", True, {"bf16": "auto"}, True, False, torch.bfloat16),
            ("cuda:0", False, {"bf16": "auto"}, False, True, torch.float16),
            ("cuda:0", False, {"bf16": "auto", "float16": True}, False, None, torch.float16),
            ("cuda:0", True, {"bf16": "auto", "fp16": True}, False, True, torch.float16),
            ("cuda:0", True, {"bf16": "auto", "fp16": False}, True, False, torch.bfloat16),
            ("cuda:0", True, {"bf16": "full"}, "full", False, torch.bfloat16),
            ("cuda:0", True, {"bfloat16": True}, None, None, torch.bfloat16),
            ("cuda:0", True, {"bf16": False}, False, None, torch.float32),
            ("cuda:0", True, {"bf16": False, "load_in_8bit": True}, False, None, torch.float16),
            ("cpu", True, {"bf16": "auto"}, True, False, torch.bfloat16),
            ("cpu", False, {"bf16": "auto"}, False, None, torch.float32),
            ("cpu", False, {"bf16": True}, True, False, torch.bfloat16),
            ("cpu", False, {"fp16": True, "bf16": "auto"}, False, False, torch.float32),
            ("cpu", False, {"load_in_8bit": True, "bf16": False}, False, None, torch.float32),
            ("mps", True, {"bf16": "auto"}, False, True, torch.float16),
            ("mps", True, {"bf16": False, "tf32": True}, False, None, torch.float32),
        ],
    )
    def test_resolution(self, monkeypatch, device, has_bf16, config, bf16, fp16, dtype):
        monkeypatch.setattr(machine, "cpu_computes_in_bf16", lambda: has_bf16)
        monkeypatch.setattr(machine, "gpu_computes_in_bf16", lambda kind: has_bf16)
        cfg = DictDefault({**config, "device": device})
        machine.resolve_dtype(cfg)
        assert (cfg.bf16, cfg.fp16, cfg.torch_dtype) == (bf16, fp16, dtype)
        if config.get("bf16") == "auto":
            assert reason(cfg, "bf16")

    def test_tf32_of_the_machine(self):
        cfg = DictDefault(tf32="auto", capabilities={"tf32": False})
        machine.resolve_tf32(cfg)
        assert cfg.tf32 is False


class TestDevices:
    @pytest.mark.parametrize(
        ("kind", "environment", "config", "device", "device_map"),
        [
            ("cpu", {}, {}, "cpu", {"": "cpu"}),
            ("cuda", {}, {}, "cuda:0", "auto"),
            ("cuda", {}, {"device_map": "sequential"}, "cuda:0", "sequential"),
            ("cuda", {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {}, "cuda:1", {"": 1}),
            ("cpu", {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {}, "cpu", {"": "cpu"}),
            ("cuda", {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, {}, "cuda:0", None),
        ],
    )
    def test_placement(self, monkeypatch, kind, environment, config, device, device_map):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(machine, "find_device_type", lambda: kind)
        cfg = DictDefault(config)
        machine.resolve_world(cfg)
        machine.resolve_device(cfg)
        assert cfg.device == device and cfg.device_map == device_map


class TestModelFacts:
    def test_where_things_are_read_from_and_what_they_are(self, base_model):
        cfg = resolved(base_model)
        assert cfg.base_model_config == cfg.tokenizer_config == base_model
        assert cfg.model_config_type == cfg.model_config_type_text == "llama"
        assert cfg.is_llama_derived_model is True and cfg.is_mistral_derived_model is False
        assert cfg.is_multimodal is False and cfg.processor_config is None

    @pytest.mark.parametrize(
        ("config", "reentrant"),
        [
            ({}, True),
            ({"unfrozen_parameters": ["lm_head"]}, False),
            ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, False),
        ],
    )
    def test_gradient_checkpointing(self, base_model, config, reentrant):
        cfg = resolved(base_model, gradient_checkpointing=True, **config)
        assert cfg.gradient_checkpointing_kwargs.use_reentrant is reentrant

    def test_no_checkpointing_no_arguments(self, base_model):
        assert resolved(base_model).gradient_checkpointing_kwargs is None

    def test_generated_metrics(self, base_model):
        cfg = validate_config(DictDefault({**CONFIG, "base_model": base_model}))
        cfg.do_causal_lm_eval = True
        normalize_config(cfg)
        assert cfg.eval_causal_lm_metrics == ["sacrebleu", "comet", "ter", "chrf"]


class TestDatasets:
    def test_the_top_level_template_reaches_every_chat(self, base_model):
        cfg = resolved(
            base_model,
            chat_template_jinja="{{ messages }}",
            datasets=[
                {"path": "a", "type": "chat_template"},
                {"path": "b", "type": "chat_template", "chat_template": "chatml"},
                {"path": "c", "type": "alpaca"},
            ],
        )
        assert [dataset.chat_template for dataset in cfg.datasets] == ["jinja", "chatml", None]
        assert [dataset.chat_template_jinja for dataset in cfg.datasets] == ["{{ messages }}", None, None]

    def test_without_any_the_tokenizers_own(self, base_model):
        cfg = resolved(base_model, datasets=[{"path": "a", "type": "chat_template"}])
        assert cfg.datasets[0].chat_template == "tokenizer_default"


class TestDeepspeed:
    def test_the_file_is_read(self, base_model, tmp_path):
        path = tmp_path / "zero2.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
        cfg = validate_config(DictDefault({**CONFIG, "base_model": base_model}))
        cfg.deepspeed = str(path)
        normalize_config(cfg)
        assert cfg.deepspeed.zero_optimization.stage == 2

    @pytest.mark.parametrize(("text", "words"), [(None, "cannot be read"), ("{", "no JSON")])
    def test_a_bad_file_is_named(self, base_model, tmp_path, text, words):
        path = tmp_path / "zero2.json"
        if text:
            path.write_text(text)
        cfg = validate_config(DictDefault({**CONFIG, "base_model": base_model}))
        cfg.deepspeed = str(path)
        with pytest.raises(ConfigError, match=words):
            normalize_config(cfg)
