"""A run of all weights in fp8, from YAML. The machine of the tests has no fp8: what it can do is said for it, and the CPU
multiplies the same quantized numbers in fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import axolotl.utils.environment as environment
from axolotl.cli.main import run
from tests.tiny import make_tiny_base


def train(folder: Path, output: str, **keys) -> list[float]:
    config = {
        "base_model": str(folder / "base"), "datasets": [{"path": str(folder / "rows.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"), "output_dir": str(folder / output), "sequence_len": 128,
        "sample_packing": True, "flash_attention": True, "micro_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 4,
        "num_epochs": 4, "save_steps": 2, "learning_rate": 0.01, "optimizer": "adamw_torch", "bf16": True, "fp8": True,
        "logging_steps": 1, **keys,
    }  # fmt: skip
    path = folder / f"{output}.yml"
    path.write_text(yaml.safe_dump(config))
    assert run(["train", str(path)]) == 0
    history = json.loads((folder / output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    facts = environment.machine_capabilities()
    monkeypatch.setattr(environment, "machine_capabilities", lambda: {**facts, "fp8": True})
    make_tiny_base(tmp_path / "base", hidden_size=64, intermediate_size=96)
    rows = [{"instruction": f"add {n} and {n}", "input": "", "output": f"{2 * n}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_losses_are_those_of_bf16_and_resuming_goes_on_to_the_last_bit(folder):
    keys = {"fp8_config": {"recipe": "rowwise"}, "gradient_checkpointing": True}
    losses = train(folder, "fp8", **keys)
    dense = train(folder, "bf16", fp8=False)
    assert losses != dense and losses == pytest.approx(dense, rel=0.05)
    shutil.copytree(folder / "fp8" / "checkpoint-2", folder / "again" / "checkpoint-2")
    written = (folder / "again" / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns
    resumed = train(folder, "again", auto_resume_from_checkpoints=True, **keys)
    assert resumed == losses
    assert (folder / "again" / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns == written, "started anew"
    weights, again = (load_file(folder / name / "model.safetensors") for name in ("fp8", "again"))
    base = load_file(folder / "base" / "model.safetensors")
    assert weights.keys() == again.keys() == base.keys()
    assert all((weights[name] == again[name]).all() for name in weights)
