"""A LoRA run with the fused kernels is the run without them, from YAML, with packing and checkpointing."""

from __future__ import annotations

import json

import pytest
import yaml

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.kernels.lora import apply_lora_mlp_swiglu
from axolotl.monkeypatch.lora_kernels import get_layers
from axolotl.train import train
from tests.tiny import make_tiny_base

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


def losses(folder, **keys):
    base = {
        "base_model": str(folder / "base"),
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": 128,
        "sample_packing": True,
        "flash_attention": True,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
    }
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump({**base, **keys}))
    cfg = load_cfg(path)
    model, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model, cfg


@pytest.mark.parametrize("keys", [{}, {"gradient_checkpointing": True}, {"lora_dropout": 0.2}])
def test_same_losses(tmp_path, keys):
    make_tiny_base(tmp_path / "base")
    rows = [{"instruction": f"add {n} and {n}", "input": "", "output": f"{2 * n}"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain, *_ = losses(tmp_path, **keys, **dict.fromkeys(KERNELS, False))
    fused, model, cfg = losses(tmp_path, **keys, **dict.fromkeys(KERNELS, True))
    assert len(plain) == 4 and fused == pytest.approx(plain, rel=1e-5)
    layers = get_layers(model)
    mlps = [layer.mlp.forward.__func__ is apply_lora_mlp_swiglu for layer in layers]
    assert all(mlps) if "lora_dropout" not in keys else not any(mlps)
    said = [choice for choice in cfg.resolution if choice["key"] in KERNELS]
    assert bool(said) == ("lora_dropout" in keys)
