"""What the benchmarks share: shapes, bases with random weights, FLOP, the matmul rate of the moment, the head of a record."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from axolotl.monkeypatch.attention.flash4 import is_usable

HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DATASHEET_TFLOPS = 989.0  # dense bf16 of an H100 or H200
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024, "rope_theta": 500000.0},
}  # fmt: skip


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def save_base(folder: Path, config: LlamaConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
    """Write a model with seeded random weights and a tokenizer. `folder` appears when both are whole."""
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)
    del model
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def flop_per_token(config: LlamaConfig, *, adapter: bool, length: float, checkpointing: bool) -> float:
    """FLOP of a training step per token.

    4N with a frozen base, which has no weight gradients, else 6N; N counts the weights of all matmuls with the output head. A second
    forward adds 2N and a third of attention, which is 6 * layers * heads * head size * length.

    Args:
        config: the model's.
        adapter: whether the base is frozen.
        length: of a row; for packed documents sum(length^2) / sum(length). 0 leaves attention out.
        checkpointing: whether the forward is computed twice.
    """
    head_size = config.hidden_size // config.num_attention_heads
    per_layer = config.hidden_size * (
        2 * config.hidden_size + 2 * config.num_key_value_heads * head_size + 3 * config.intermediate_size
    )
    weights = config.num_hidden_layers * per_layer + config.vocab_size * config.hidden_size
    attention = 6 * config.num_hidden_layers * config.hidden_size * length
    passes = 4 if adapter else 6
    return (passes + 2) * weights + attention * 4 / 3 if checkpointing else passes * weights + attention


def matmul_tflops(size: int = 8192, repeats: int = 30) -> float:
    """What bf16 matmuls reach on this device, just now."""
    if DEVICE == "cpu":
        size, repeats = 512, 2
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    synchronize()
    rate = 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12
    del a, b
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return rate


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu-{os.cpu_count()}"


def device_slug() -> str:
    """The device as it begins the name of a result."""
    return device_name().replace(" ", "-").lower()


def shown_command() -> str:
    """The command of this process, with `...` for the paths of this machine."""
    words = []
    for word in sys.argv[1:]:
        key, equals, value = word.rpartition("=")
        words.append(f"{key}{equals}..." if Path(value).is_absolute() else word)
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def record_head() -> dict[str, Any]:
    """When, how, on what and with what something was measured: the first keys of every record."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shown_command(),
        "commit": commit.strip(),
        "device": device_name(),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, peft)},
            **({"flash-attn-4": importlib.metadata.version("flash-attn-4")} if is_usable(torch.device(DEVICE)) else {}),
        },
    }
