"""From YAML to merged model on a GPU, through the command line: full, LoRA, QLoRA and 8-bit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.tiny import make_tiny_base

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ADAPTERS = {
    "full": {},
    "lora": {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True},
    "qlora": {"adapter": "qlora", "load_in_4bit": True, "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True},
    "8bit": {"adapter": "lora", "load_in_8bit": True, "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True},
}


def axolotl(*arguments: str, stdin: str = "") -> str:
    command = [sys.executable, "-m", "axolotl.cli.main", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def write_run(folder: Path, **keys: Any) -> Path:
    """A config of 300 short conversations and a tiny Llama."""
    base = make_tiny_base(folder / "base", hidden_size=128, intermediate_size=256)
    rows = [
        {"messages": [{"role": "user", "content": f"{n} and {n}?"}, {"role": "assistant", "content": f"{2 * n}"}]}
        for n in range(300)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "base_model": str(base),
        "datasets": [{"path": str(folder / "data.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 0.1,
        "sequence_len": 256,
        "sample_packing": True,
        "flash_attention": True,
        "bf16": "auto",
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_epochs": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "output_dir": str(folder / "out"),
        **keys,
    }
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def read_losses(output_dir: Path) -> list[float]:
    checkpoint = max(output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    return [entry["loss"] for entry in json.loads(checkpoint.read_text())["log_history"] if "loss" in entry]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_train_merge_and_answer(tmp_path: Path, adapter: str, checkpointing: bool):
    path = write_run(tmp_path, gradient_checkpointing=checkpointing, **ADAPTERS[adapter])
    axolotl("train", str(path))
    losses = read_losses(tmp_path / "out")
    assert losses[-1] < 0.7 * losses[0]
    if adapter != "full":
        axolotl("merge-lora", str(path))
        assert list((tmp_path / "out" / "merged").glob("*.safetensors"))
    axolotl("evaluate", str(path))
    assert axolotl("inference", str(path), stdin="2 and 2?")


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_adapters_that_start_from_the_data_train(tmp_path: Path, start: str):
    path = write_run(tmp_path, **ADAPTERS["lora"], peft_init_lora_weights=start)
    axolotl("train", str(path))
    losses = read_losses(tmp_path / "out")
    assert losses[-1] < 0.7 * losses[0]


def test_the_largest_batch_that_fits_is_found(tmp_path: Path):
    """16 rows that take about twice the memory of the GPU, at 320 KB a token."""
    length = torch.cuda.get_device_properties(0).total_memory * 2 // 16 // 320_000
    rows = [{"input_ids": [3 + (n + i) % 300 for i in range(length)]} for n in range(32)]
    rows = [{**row, "labels": row["input_ids"], "attention_mask": [1] * length} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = make_tiny_base(tmp_path / "base", hidden_size=512, intermediate_size=1408, num_hidden_layers=8)
    path = tmp_path / "config.yml"
    config = {
        "base_model": str(base),
        "datasets": [{"path": str(tmp_path / "rows.jsonl"), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "val_set_size": 0,
        "sequence_len": length,
        "bf16": "auto",
        "auto_find_batch_size": True,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "output_dir": str(tmp_path / "out"),
    }
    path.write_text(yaml.safe_dump(config))
    printed = axolotl("train", str(path))
    found = re.search(r"micro_batch_size\W+(\d+)[^\n]*the largest that fits", printed)
    assert found and 1 < int(found[1]) < 16, printed[-3000:]
