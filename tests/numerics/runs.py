"""The recorded runs: tiny models in fp32 on one CPU thread, trained by `axolotl train` from a config, with every seed fixed.

The losses of their steps stand in `losses.json`. They protect against a change that no other test sees, because each part is
still right by itself: another token or label in a row, another order of rows, another packing, another count of supervised
tokens, another first value of an adapter, another rate or decay. A difference is not yet a mistake, but it has to be meant.

Record again, when it is meant, and say why in the commit:

    python -m tests.numerics.runs
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from axolotl.cli.main import run
from tests.tiny import TEXT, make_tiny_base

RECORD = Path(__file__).parent / "losses.json"
NUM_STEPS = 20
WORDS = " ".join(TEXT).split()

CHAT = {
    "datasets": [{"path": "chat.jsonl", "type": "chat_template", "chat_template": "tokenizer_default"}],
    "eot_tokens": ["<|im_end|>"], "sample_packing": True, "micro_batch_size": 2, "gradient_accumulation_steps": 2,
    "weight_decay": 0.1, "cosine_min_lr_ratio": 0.1,
}  # fmt: skip
ADAPTER = {
    "datasets": [{"path": "alpaca.jsonl", "type": "alpaca"}, {"path": "text.jsonl", "type": "completion"}],
    "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lora_target_linear": True, "peft_use_rslora": True,
    "micro_batch_size": 4, "gradient_accumulation_steps": 1, "group_by_length": True, "learning_rate": 3e-2,
}  # fmt: skip

# Name -> architecture of `tests.tiny`, and the config.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, all weights, packed conversations": ("llama", CHAT),
    "gemma2, LoRA, instructions and text by length": ("gemma2", ADAPTER),
}


def write_rows(folder: Path) -> None:
    """Conversations, instructions and texts made of the words that the tokenizer was trained on."""
    rng = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    def turns() -> list[dict[str, str]]:
        pairs = [("user", words(2, 6)) if n % 2 == 0 else ("assistant", words(2, 9)) for n in range(rng.choice([2, 4]))]
        return [{"role": role, "content": content} for role, content in pairs]

    rows = {
        "chat": [{"messages": turns()} for _ in range(160)],
        "alpaca": [{"instruction": words(2, 5), "input": words(0, 2), "output": words(1, 6)} for _ in range(60)],
        "text": [{"text": words(4, 20)} for _ in range(40)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def make_base(folder: Path, architecture: str) -> None:
    """A tiny model whose weights depend on torch's generator alone, not on how transformers initialises a model."""
    make_tiny_base(folder, architecture)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1, generator=generator)
    model.save_pretrained(folder)


def losses_of(name: str, folder: Path) -> list[float]:
    """Train the run `name` in `folder` and return the losses of its steps."""
    architecture, keys = RUNS[name]
    make_base(folder / "base", architecture)
    write_rows(folder)
    datasets = [{**dataset, "path": str(folder / dataset["path"])} for dataset in keys["datasets"]]
    config = {
        "base_model": str(folder / "base"), "sequence_len": 128, "max_steps": NUM_STEPS, "num_epochs": 10, "learning_rate": 5e-3,
        "lr_scheduler": "cosine", "warmup_steps": 3, "optimizer": "adamw_torch", "bf16": False, "logging_steps": 1, "seed": 7,
        "save_strategy": "no", "output_dir": str(folder / "out"), "dataset_prepared_path": str(folder / "prepared"),
        **keys, "datasets": datasets,
    }  # fmt: skip
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    if run(["train", str(folder / "config.yml")]) != 0:
        raise RuntimeError(f"the run {name!r} failed")
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def record() -> None:
    """Train every run and write `losses.json`."""
    torch.set_num_threads(1)
    found = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = [round(loss, 6) for loss in losses_of(name, Path(folder))]
    RECORD.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    record()
