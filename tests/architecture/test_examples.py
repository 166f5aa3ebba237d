"""Every shipped YAML is a config that validates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted([*ROOT.glob("examples/**/*.yml"), *ROOT.glob("examples/**/*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_example_validates(path: Path):
    validate_config(DictDefault(yaml.safe_load(path.read_text())))


def test_there_are_examples():
    assert len(CONFIGS) >= 3


@pytest.mark.parametrize("path", sorted(ROOT.glob("deepspeed_configs/*.json")), ids=lambda path: path.name)
def test_deepspeed_config_is_json(path: Path):
    assert "zero_optimization" in json.loads(path.read_text())
