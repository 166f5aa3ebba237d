"""From YAML to merged model on a GPU, through the command line: full, LoRA, QLoRA and 8-bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    return done.stdout


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_train_merge_and_answer(tmp_path: Path, adapter: str, checkpointing: bool):
    base = make_tiny_base(tmp_path / "base", hidden_size=128, intermediate_size=256)
    rows = [
        {"messages": [{"role": "user", "content": f"{n} and {n}?"}, {"role": "assistant", "content": f"{2 * n}"}]}
        for n in range(300)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "base_model": str(base),
        "datasets": [{"path": str(tmp_path / "data.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "val_set_size": 0.1,
        "sequence_len": 256,
        "sample_packing": True,
        "flash_attention": True,
        "bf16": "auto",
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": checkpointing,
        "num_epochs": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "output_dir": str(tmp_path / "out"),
        **ADAPTERS[adapter],
    }
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(config))
    axolotl("train", str(path))
    checkpoint = max(
        (tmp_path / "out").glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1])
    )
    losses = [entry["loss"] for entry in json.loads(checkpoint.read_text())["log_history"] if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    if adapter != "full":
        axolotl("merge-lora", str(path))
        assert list((tmp_path / "out" / "merged").glob("*.safetensors"))
    axolotl("evaluate", str(path))
    assert axolotl("inference", str(path), stdin="2 and 2?")
