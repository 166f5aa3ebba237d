"""The forecast of whole runs, from YAML and the model's shape alone, against peaks measured on an H200.

`torch.cuda.max_memory_allocated` of torch 2.11, random weights, rank-16 adapters on all linear layers in float32, bf16, fused
AdamW. Rows of 4,096 are full and come from `benchmarks/llama.py`, which holds one more copy of what trains, its values at the
start; packed ones come from `benchmarks/gsm8k_llama.py` and `benchmarks/row.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from axolotl.cli.config import inspect_cfg
from axolotl.loaders.utils import load_model_config
from axolotl.plan_run import build_blank_model, read_run
from axolotl.utils.dict import DictDefault
from axolotl.utils.forecast import GIB, Run, forecast
from axolotl.utils.gpus import capabilities_of
from axolotl.utils.remedies import remedies

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256,
           "tie_word_embeddings": True},
    "1b-32k": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32064,
               "tie_word_embeddings": True},
}  # fmt: skip
LORA = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}
QLORA = {**LORA, "adapter": "qlora", "load_in_4bit": True}
ROWS = {"sequence_len": 4096, "pad_to_sequence_len": True, "micro_batch_size": 2}
PACKED = {"sequence_len": 8192, "sample_packing": True, "flash_attention": True, "micro_batch_size": 1}
PLAIN = {
    "torch_compile": False, "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False,
    "lora_embedding_kernel": False,
}  # fmt: skip
CHECKPOINTING = {"gradient_checkpointing": True, "activation_offloading": False}
OFFLOADING = {"gradient_checkpointing": True, "activation_offloading": True}

# Shape, keys, measured GiB.
MEASURED: dict[str, tuple[str, dict[str, Any], float]] = {
    "lora-8b": ("8b", {**LORA, **ROWS}, 39.85),
    "lora-8b-plain": ("8b", {**LORA, **ROWS, **PLAIN}, 70.19),
    "lora-8b-kernels-only": ("8b", {**LORA, **ROWS, "torch_compile": False}, 47.96),
    "lora-8b-fp8": ("8b", {**LORA, **ROWS, "fp8": True}, 39.85),
    "lora-8b-checkpointing": ("8b", {**LORA, **ROWS, **CHECKPOINTING}, 19.31),
    "lora-8b-offloading": ("8b", {**LORA, **ROWS, **OFFLOADING}, 17.52),
    "lora-8b-checkpointing-default": ("8b", {**LORA, **ROWS, "gradient_checkpointing": True}, 17.5),
    "qlora-8b": ("8b", {**QLORA, **ROWS}, 30.2),
    "qlora-8b-checkpointing": ("8b", {**QLORA, **ROWS, **CHECKPOINTING}, 9.7),
    "qlora-8b-offloading": ("8b", {**QLORA, **ROWS, **OFFLOADING}, 7.88),
    "lora-8b-packed": ("8b", {**LORA, **PACKED}, 39.5),
    "lora-8b-longest": ("8b", {**LORA, **PACKED, **OFFLOADING, "sequence_len": 262144, "torch_compile": True}, 70.52),
    "lora-1b": ("1b", {**LORA, **ROWS}, 9.58),
    "lora-1b-plain": ("1b", {**LORA, **ROWS, **PLAIN}, 17.63),
    "lora-1b-offloading": ("1b", {**LORA, **ROWS, **OFFLOADING}, 3.44),
    "lora-1b-packed": ("1b", {**LORA, **PACKED}, 11.54),
    "lora-1b-32k-packed": (
        "1b-32k",
        {**LORA, **PACKED, "sequence_len": 4096, "micro_batch_size": 2, "cuda_graphs": False},
        8.92,
    ),
    "full-1b": ("1b", {**ROWS, "micro_batch_size": 4}, 26.2),
    "full-1b-plain": ("1b", {**ROWS, "micro_batch_size": 4, "torch_compile": False}, 40.2),
    "full-8b-packed": (
        "8b",
        {**PACKED, "gradient_checkpointing": True, "bf16": "full", "optimizer": "adamw_bnb_8bit"},
        51.6,
    ),
}  # fmt: skip


def run_of(folder: Path, shape: str, keys: dict[str, Any]) -> Run:
    """What `axolotl plan --gpu h200` reads from a config."""
    config = LlamaConfig(
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, **SHAPES[shape]
    )  # fmt: skip
    config.save_pretrained(folder)
    written = {
        "base_model": str(folder), "datasets": [{"path": "rows.jsonl", "type": "alpaca"}], "output_dir": str(folder / "out"),
        "bf16": "auto", "optimizer": "adamw_torch_fused", "gradient_accumulation_steps": 4, "num_epochs": 1,
        "learning_rate": 1e-4, **keys,
    }  # fmt: skip
    cfg = inspect_cfg(DictDefault(written), machine=capabilities_of("h200"))
    return read_run(cfg, *build_blank_model(cfg, load_model_config(cfg)))


@pytest.mark.parametrize("name", MEASURED)
def test_the_forecast_agrees_with_the_measured_peak(tmp_path, name):
    shape, keys, measured = MEASURED[name]
    run = run_of(tmp_path, shape, keys)
    copy = 0 if keys.get("sample_packing") else run.num_trained * run.trained_bytes
    expected = measured - copy / GIB
    assert forecast(run).allocated / GIB == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("name", "memory_gib"), [("lora-8b", 24), ("lora-8b-plain", 40), ("full-1b", 14)])
def test_a_remedy_needs_what_it_says(tmp_path, name, memory_gib):
    shape, keys, _ = MEASURED[name]
    run = run_of(tmp_path, shape, keys)
    can_quantize = run.is_adapter and run.weight_bits == 16
    found = remedies(run, memory_gib * GIB, micro_batch_size=keys["micro_batch_size"], can_quantize=can_quantize)
    same_method = [remedy for remedy in found if run.is_adapter or "adapter" not in remedy.change]
    assert len(same_method) >= 5
    for remedy in same_method:
        change = yaml.safe_load("{" + remedy.change.replace("accumulation_steps x", "accumulation_steps:") + "}")
        changed = forecast(run_of(tmp_path, shape, {**keys, **change}))
        assert remedy.forecast.total == pytest.approx(changed.total, rel=0.02), remedy.change
