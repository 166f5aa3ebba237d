"""The weights of a model with its adapter merged in, without touching the model."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from axolotl.exceptions import ModelError


def _merged_weight(layer: Any) -> torch.Tensor:
    """The base weight of a LoRA layer plus the deltas of its active adapters; DoRA rescales it. Same dtype and shape."""
    from peft.utils.integrations import dequantize_module_weight

    base = layer.get_base_layer()
    weight = dequantize_module_weight(base) if hasattr(base.weight, "quant_state") else base.weight.detach()
    merged = weight.to(torch.float32).clone()
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A and adapter not in getattr(layer, "lora_embedding_A", {}):
            continue
        delta = layer.get_delta_weight(adapter).to(torch.float32)
        if adapter in getattr(layer, "lora_magnitude_vector", {}):
            magnitude = layer.lora_magnitude_vector[adapter]
            transposed = bool(layer.fan_in_fan_out)
            total = merged + delta
            norm = torch.linalg.norm(total.T if transposed else total, dim=1)
            factor = (magnitude.weight.float() / norm)[:, None]
            merged = total * (factor.T if transposed else factor)
        else:
            merged = merged + delta
    return merged.to(weight.dtype)


@torch.no_grad()
def get_lora_merged_state_dict(model: PeftModel) -> dict[str, torch.Tensor]:
    """A state dict of the base model with the LoRA deltas added to its weights. `model` is not modified.

    Args:
        model: a PEFT model whose active adapters are LoRA (DoRA, rsLoRA and `modules_to_save` included).

    Returns:
        Names as in the base model's own state dict, tensors on the CPU.

    Raises:
        ModelError: an adapter of another kind is active.
    """
    base = model.get_base_model()
    for name, config in model.peft_config.items():
        if config.peft_type != "LORA":
            raise ModelError(f"Adapter {name!r} is of type {config.peft_type}; only LoRA adapters can be merged.")
    state: dict[str, torch.Tensor] = {}
    for name, module in base.named_modules():
        prefix = _plain_name(name)
        if isinstance(module, LoraLayer):
            state[f"{prefix}.weight"] = _merged_weight(module).cpu()
            bias = getattr(module.get_base_layer(), "bias", None)
            if bias is not None:
                state[f"{prefix}.bias"] = bias.detach().cpu()
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]]
            state.update({f"{prefix}.{key}": value.detach().cpu() for key, value in trained.state_dict().items()})
    for key, value in base.state_dict().items():
        plain = _plain_name(key)
        if plain not in state and not _belongs_to_adapter(key):
            state[plain] = value.detach().cpu()
    return state


def _belongs_to_adapter(key: str) -> bool:
    return ".lora_" in key or ".modules_to_save." in key or ".original_module." in key


def _plain_name(name: str) -> str:
    return name.replace(".base_layer", "").replace("base_model.model.", "")
