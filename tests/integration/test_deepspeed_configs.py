"""The shipped DeepSpeed configs are whole and leave to the YAML what belongs there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEEPSPEED = sorted((ROOT / "deepspeed_configs").glob("*.json"))


def test_the_documented_ones_are_there():
    assert {path.name for path in DEEPSPEED} == {
        "zero1.json",
        "zero1_torch_compile.json",
        "zero2.json",
        "zero3.json",
        "zero3_bf16.json",
        "zero3_bf16_cpuoffload_all.json",
        "zero3_bf16_cpuoffload_params.json",
    }


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.name)
def test_deepspeed_config_leaves_the_batch_to_the_yaml(path):
    config = json.loads(path.read_text(encoding="utf-8"))
    assert f"zero{config['zero_optimization']['stage']}" == path.stem.partition("_")[0]
    for key in (
        "gradient_accumulation_steps",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_clipping",
    ):
        assert config[key] == "auto"
    offloaded = {key for key in config["zero_optimization"] if key.startswith("offload_")}
    expected = {"params": {"offload_param"}, "all": {"offload_param", "offload_optimizer"}}
    assert offloaded == next((keys for name, keys in expected.items() if path.stem.endswith(name)), set())
