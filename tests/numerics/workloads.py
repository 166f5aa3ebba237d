"""The fast paths against plain PyTorch: a tiny Llama in fp32 that trains for 50 steps both ways on the same tokens.

Plain is eager transformers, with peft for adapters and the cross-entropy of the model over all logits. Fast is what a run does on a GPU:
fused adapters, compiled layers, quantized weights, the fused loss. Errors of a gradient add up over the steps, so that a wrong one
shows even where it is small. Both curves stand in `workloads.json`. Record again, when a difference is meant:

    python -m tests.numerics.workloads
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from axolotl.kernels.cross_entropy import linear_cross_entropy
from axolotl.monkeypatch.compile_layers import compile_layers
from axolotl.monkeypatch.fp8_base import apply_fp8_base
from axolotl.monkeypatch.fp8_linear import apply_fp8_training
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_model

RECORD = Path(__file__).parent / "workloads.json"
NUM_STEPS = 50
KERNELS = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}


def _kernels(model: nn.Module) -> None:
    cfg = DictDefault(KERNELS)
    apply_lora_kernel_patches(model, cfg)
    assert cfg.resolution is None, cfg.resolution


def _compiled_kernels(model: nn.Module) -> None:
    _kernels(model)
    compile_layers(model, {"backend": "aot_eager"})


def _fp8_base(model: nn.Module) -> None:
    _kernels(model)
    apply_fp8_base(model, DictDefault())


def _compiled(model: nn.Module) -> None:
    compile_layers(model, {"backend": "aot_eager"})


def _fp8(recipe: str) -> Callable[[nn.Module], None]:
    return lambda model: apply_fp8_training(model, DictDefault(fp8_config={"recipe": recipe}))


@dataclass(frozen=True)
class Workload:
    """One row of the proof.

    Attributes:
        adapter: "lora", "qlora", or None for all weights.
        make_fast: turns the plain model into the fast one.
        tolerance: how far the loss of any step may be from that of plain PyTorch, as a share of it.
    """

    adapter: str | None
    make_fast: Callable[[nn.Module], None]
    tolerance: float


# What only computes in another order differs in the last digits. fp8 has two or three bits behind the point.
WORKLOADS = {
    "LoRA, kernels": Workload("lora", _kernels, 1e-4),
    "LoRA, kernels, compiled": Workload("lora", _compiled_kernels, 1e-4),
    "LoRA, frozen base in fp8": Workload("lora", _fp8_base, 0.03),
    "QLoRA, kernels": Workload("qlora", _kernels, 1e-4),
    "all weights, compiled": Workload(None, _compiled, 1e-4),
    "all weights, fp8 tensorwise": Workload(None, _fp8("tensorwise"), 0.03),
    "all weights, fp8 rowwise": Workload(None, _fp8("rowwise"), 0.03),
    "all weights, fp8 rowwise_with_gw_hp": Workload(None, _fp8("rowwise_with_gw_hp"), 0.03),
}


def _quantize(model: Any) -> None:
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for name, linear in [*layer.named_modules()]:
            if isinstance(linear, nn.Linear):
                made = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
                made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
                parent, _, own = name.rpartition(".")
                setattr(layer.get_submodule(parent), own, made)
    model.is_loaded_in_4bit = True  # peft looks here


def make_model(adapter: str | None, folder: Path) -> Any:
    """The model of a workload as plain PyTorch runs it."""
    model = make_tiny_model(folder, hidden_size=64, intermediate_size=128)
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3)
    if adapter is None:
        return model.train()
    model.requires_grad_(False)
    if adapter == "qlora":
        _quantize(model)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()


def train(model: Any, *, fused_loss: bool) -> list[float]:
    """The losses of the steps. Each row repeats a piece of random tokens: what was seen once can be foretold."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_adapter = isinstance(model, PeftModel)
    optimizer = torch.optim.AdamW(trained, lr=1e-2 if is_adapter else 5e-3)
    base = model.get_base_model() if is_adapter else model
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(NUM_STEPS):
        ids = torch.randint(3, 64, (4, 8), generator=generator).repeat(1, 4)
        if fused_loss:
            hidden = base.model(input_ids=ids).last_hidden_state
            loss = linear_cross_entropy(hidden[:, :-1], base.lm_head.weight, ids[:, 1:]) / ids[:, 1:].numel()
        else:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@functools.cache
def plain_curve(adapter: str | None) -> list[float]:
    """The losses of plain PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        return train(make_model(adapter, Path(folder)), fused_loss=False)


def fast_curve(name: str) -> list[float]:
    """The losses of a workload run fast."""
    workload = WORKLOADS[name]
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(workload.adapter, Path(folder))
    workload.make_fast(model)
    return train(model, fused_loss=True)


def largest_difference(ours: list[float], wanted: list[float]) -> float:
    """The largest difference of the losses of a step, as a share of the wanted one."""
    return max(abs(a - b) / b for a, b in zip(ours, wanted, strict=True))


def record() -> None:
    """Train every workload both ways and write `workloads.json`."""
    torch.set_num_threads(1)
    rows = []
    for name, workload in WORKLOADS.items():
        plain, fast = plain_curve(workload.adapter), fast_curve(name)
        difference = largest_difference(fast, plain)
        print(f"{name}: {plain[0]:.3f} -> {plain[-1]:.3f} plain, {fast[-1]:.3f} fast, differs by {difference:.1e}")
        curves = {kind: [round(loss, 5) for loss in losses] for kind, losses in (("plain", plain), ("fast", fast))}
        row = {"tolerance": workload.tolerance, "largest_difference": float(f"{difference:.1e}"), **curves}
        rows.append(f"{json.dumps(name)}: {json.dumps(row)}")
    RECORD.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    record()
