from __future__ import annotations

import json
import logging

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


@pytest.fixture(autouse=True)
def _logging_as_before():
    """A command configures logging for its process, on streams that pytest closes when the test ends."""
    loggers = [logging.getLogger(), logging.getLogger("axolotl")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


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
