"""The frozen base of a LoRA run in 8-bit floating point: `fp8: true` with `adapter: lora`.

Half of the arithmetic of such a run multiplies by weights that never change. They are quantized once, when the model is
loaded; adapters, norms, embeddings and the output head stay as they are. The merged model is made from the base on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from axolotl.exceptions import ConfigError
from axolotl.kernels.fp8 import MULTIPLE, to_fp8
from axolotl.kernels.lora import apply_lora_o, apply_lora_qkv
from axolotl.monkeypatch.lora_kernels import get_layers
from axolotl.utils.dict import DictDefault, note_choice


def _base(projection: nn.Module) -> nn.Module:
    return projection.base_layer if isinstance(projection, LoraLayer) else projection


def _find_groups(model: nn.Module) -> Iterator[list[tuple[nn.Module, str]]]:
    """Places (parent, name) of the projections that run as fused operators, together where they share a transposed weight."""
    for layer in get_layers(model):
        for module in layer.modules():
            kind: Any = type(module)
            if not hasattr(kind, "_lora_kernels_base"):
                continue
            if hasattr(module, "gate_proj"):
                yield [(module, "gate_proj"), (module, "up_proj")]
                yield [(module, "down_proj")]
            if getattr(kind, "apply_qkv", None) is apply_lora_qkv:
                yield [(module, "q_proj"), (module, "k_proj"), (module, "v_proj")]
            if getattr(kind, "apply_o", None) is apply_lora_o:
                yield [(module, "o_proj")]


def apply_fp8_base(model: PeftModel, cfg: DictDefault) -> None:
    """Quantize the frozen weights below the adapters of the layers that run as fused LoRA operators.

    Args:
        model: with the LoRA kernels applied. Changed in place.
        cfg: the config; the number of quantized layers is noted.

    Raises:
        ConfigError: no layer of the model can be quantized.
    """
    done = kept = 0
    for group in _find_groups(model):
        linears = [_base(getattr(parent, name)) for parent, name in group]
        fits = all(
            type(linear) is nn.Linear
            and linear.weight.is_floating_point()
            and not linear.weight.requires_grad
            and linear.in_features % MULTIPLE == linear.out_features % MULTIPLE == 0
            for linear in linears
        )
        if not fits:
            kept += len(group)
            continue
        for (parent, name), quantized in zip(group, to_fp8(linears), strict=True):
            projection = getattr(parent, name)
            if isinstance(projection, LoraLayer):
                projection.base_layer = quantized
            else:
                setattr(parent, name, quantized)
        done += len(group)
    if not done:
        raise ConfigError(
            "`fp8: true` quantizes the frozen layers that the LoRA kernels run, and this model has none of them. Write "
            "`lora_mlp_kernel: true`, `lora_qkv_kernel: true` and `lora_o_kernel: true`, or remove `fp8`."
        )
    note_choice(
        cfg, "fp8", f"{done} frozen layers in e4m3", f"{kept} stay as they are" if kept else "the LoRA kernels run them"
    )
