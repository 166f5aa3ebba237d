from __future__ import annotations

import pytest
import torch

from axolotl.utils.config import machine
from axolotl.utils.config.machine import resolve_dtype
from axolotl.utils.dict import DictDefault

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LORA = {"adapter": "lora"}


@pytest.mark.parametrize(
    ("config", "on_gpu", "on_cpu"),
    # Expected: dtype of the weights, computing in bf16, in fp16. The CPU of this test has no bf16 units.
    [
        ({"bf16": "auto"}, (BF16, True, False), (FP32, False, False)),
        ({"bf16": True}, (BF16, True, False), (BF16, True, False)),
        ({"bf16": "full"}, (BF16, True, False), (BF16, True, False)),
        ({"bf16": False}, (FP32, False, False), (FP32, False, False)),
        ({"bf16": True, "float32": True}, (FP32, True, False), (FP32, True, False)),
        ({"bf16": False, "fp16": True}, (FP16, False, True), (FP32, False, False)),
        ({"bf16": "auto", "fp16": True, **LORA}, (FP16, False, True), (FP32, False, False)),
        ({"bf16": True, "fp16": True}, (BF16, True, False), (BF16, True, False)),
        ({"bf16": "auto", "float16": True}, (FP16, False, False), (FP16, False, False)),
        ({"bf16": False, "bfloat16": True}, (BF16, False, False), (BF16, False, False)),
        ({"bf16": False, "float32": True}, (FP32, False, False), (FP32, False, False)),
        ({"bf16": False, "load_in_8bit": True, **LORA}, (FP16, False, False), (FP32, False, False)),
    ],
)
def test_number_formats(monkeypatch, config, on_gpu, on_cpu):
    monkeypatch.setattr(machine, "gpu_computes_in_bf16", lambda kind="cuda": True)
    monkeypatch.setattr(machine, "cpu_computes_in_bf16", lambda: False)
    for device, expected in (("cuda:0", on_gpu), ("cpu", on_cpu)):
        cfg = DictDefault(device=device, **config)
        resolve_dtype(cfg)
        assert (cfg.torch_dtype, bool(cfg.bf16), bool(cfg.fp16)) == expected, device


def test_a_gpu_without_bf16_takes_fp16(monkeypatch):
    monkeypatch.setattr(machine, "gpu_computes_in_bf16", lambda kind="cuda": False)
    cfg = DictDefault(device="cuda:0", bf16="auto", **LORA)
    resolve_dtype(cfg)
    assert (cfg.torch_dtype, cfg.bf16, cfg.fp16) == (FP16, False, True)
    assert {entry["key"] for entry in cfg.resolution} == {"bf16", "fp16"}


@pytest.mark.parametrize(
    ("key", "value", "same"), [("device", "tpu", "cpu:0"), ("torch_dtype", "float16", "torch.float32")]
)
def test_what_is_chosen_for_each_process_and_written_otherwise_is_said(key, value, same, monkeypatch):
    said = []
    monkeypatch.setattr(machine.LOG, "warning", said.append)
    for written, expected in ((value, 1), (same, 0)):
        said.clear()
        cfg = DictDefault(bf16=False, **{key: written})
        machine.resolve_device(cfg)
        machine.resolve_dtype(cfg)
        assert len(said) == expected
        assert all(f"`{key}: {written}` is not used" in line for line in said)
