from __future__ import annotations

import json

import pytest

from axolotl.cli.utils import overrides

OPTIONS = [
    {"flag": "--micro-batch-size", "type": "int", "help": "Rows per device and step.", "group": "Training"},
    {"flag": "--learning-rate", "type": "float", "help": "", "group": "Training"},
    {"flag": "--val-set-size", "type": "float", "help": "", "group": "Data"},
    {"flag": "--sample-packing", "type": "bool | None", "help": "", "group": "Data"},
    {"flag": "--bf16", "type": 'bool | "auto" | None', "help": "", "group": "Training"},
    {"flag": "--wandb-name", "type": "str | None", "help": "", "group": "Tracking"},
    {"flag": "--eval-strategy", "type": '"no" | "steps" | None', "help": "", "group": "Training"},
    {"flag": "--deepspeed", "type": "str | dict[str, Any] | None", "help": "", "group": "Training"},
    {"flag": "--trl", "type": "TRLConfig", "help": "", "group": "RL"},
    {"flag": "--trl.beta", "type": "float | None", "help": "", "group": "RL"},
    {"flag": "--trl.use-vllm", "type": "bool", "help": "", "group": "RL"},
    {"flag": "--lr-scheduler-kwargs", "type": "dict[str, Any] | None", "help": "", "group": "Training"},
    {"flag": "--lora-target-modules", "type": "list[str] | str | None", "help": "", "group": "LoRA"},
]


@pytest.fixture
def config_options(tmp_path, monkeypatch):
    """A small generated options file in the place of the real one."""
    path = tmp_path / "config_options.json"
    path.write_text(json.dumps(OPTIONS))
    monkeypatch.setattr(overrides, "OPTIONS_FILE", path)
    overrides.read_config_options.cache_clear()
    yield path
    overrides.read_config_options.cache_clear()


@pytest.fixture
def no_config_options(tmp_path, monkeypatch):
    """As before the options file is generated."""
    monkeypatch.setattr(overrides, "OPTIONS_FILE", tmp_path / "absent.json")
    overrides.read_config_options.cache_clear()
    yield
    overrides.read_config_options.cache_clear()
