"""Joins the projections of an attention where all weights are trained: q, k and v multiply as one.

The three weights get one memory and stay parameters of their own, with the names and shapes that they had. They are multiplied
by `axolotl.kernels.joined_linear` in compiled passes that learn, and by their layers everywhere else. Whether they still can be
is asked when a layer is compiled: hooks, adapters, parametrizations and frozen weights may come later. Queries and keys without a
bias come rotated, where `lora_rotary` finds that the forward rotates them next.

Gate and up of an MLP stay apart. Each is large enough for a GPU, and to multiply their gradients as one the compiler would lay
these side by side in a kernel that reads the activations twice.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from axolotl.kernels.frozen_weights import lay_in_a_row, lie_in_a_row
from axolotl.kernels.joined_linear import joined_linear, joined_linear_rotated
from axolotl.kernels.lora_ops import rotates_in_graph
from axolotl.monkeypatch.compile_layers import runs_compiled
from axolotl.monkeypatch.lora_kernels import (
    QKV,
    become,
    find_attentions,
    get_layers,
    original_apply_o,
    original_apply_qkv,
    read_original_forward,
    rotating_forward,
    why_not_seen_through,
    wrapped_forward,
)
from axolotl.monkeypatch.lora_rotary import Rotation, find_rotation
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


def _is_plain(linear: Any) -> bool:
    watched = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) is nn.Linear and "forward" not in linear.__dict__ and not watched


def _can_multiply(x: torch.Tensor, linears: list[Any]) -> bool:
    """Whether linear layers can be computed as one in the pass that is being compiled."""
    if not torch.compiler.is_compiling() or not all(map(_is_plain, linears)):
        return False
    first, *others = [linear.weight for linear in linears]
    alike = all(other.dtype == first.dtype and other.requires_grad == first.requires_grad for other in others)
    return alike and (x.dtype == first.dtype or torch.is_autocast_enabled(x.device.type))


def apply_joined_qkv(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of an attention with `q_proj`, `k_proj` and `v_proj`; x is (..., H)."""
    linears = [self.q_proj, self.k_proj, self.v_proj]
    if not _can_multiply(x, linears):
        return original_apply_qkv(self, x)
    query, key, value = joined_linear(x, [linear.weight for linear in linears], [linear.bias for linear in linears])
    # What is kept for backward as it is, such as the values, must not keep the others with it.
    apart = torch.contiguous_format
    return query, key.clone(memory_format=apart), value.clone(memory_format=apart)


def apply_joined_qkv_rotated(
    self: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Queries and keys with their positions, and values, in compiled layers; None where they are better computed one by one.

    Arguments and results are those of `axolotl.kernels.lora.apply_lora_qkv_rotated`.
    """
    linears = [self.q_proj, self.k_proj, self.v_proj]
    if not _can_multiply(x, linears) or any(linear.bias is not None for linear in linears):
        return None
    if not rotates_in_graph(x, (0, 0, 0), self.head_dim, cos, sin):
        return None
    return joined_linear_rotated(x, [linear.weight for linear in linears], cos, sin)


def _own_storages(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Give each of the three weights in a state dict a storage of its own, without a copy.

    Where weights share one, transformers copies them on the GPU before it saves, accelerate leaves all but the first out of its
    file, and `torch.save` of some of them writes all.
    """
    for name in QKV:
        weight = state.get(f"{prefix}{name}.weight")
        if type(weight) is torch.Tensor and weight.untyped_storage().nbytes() != weight.nbytes:
            state[f"{prefix}{name}.weight"] = torch.from_dlpack(weight)


def _why_not(attention: Any, uses: Counter[int]) -> str | None:
    """Why an attention stays as it is, or None.

    Args:
        attention: has the three projections.
        uses: how many parameters of the model begin at an address.
    """
    if getattr(attention, "is_kv_shared_layer", False):
        return "they take keys and values from another layer"
    linears = [getattr(attention, name) for name in QKV]
    if not all(map(_is_plain, linears)):
        return "a projection is no plain linear layer"
    weights = [linear.weight for linear in linears]
    if any(type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor for weight in weights):
        return "a weight is of a type of its own"
    if any(weight.is_meta or not weight.is_floating_point() for weight in weights):
        return "a weight is not loaded, or of integers"
    if len({(weight.device, weight.dtype, weight.shape[1]) for weight in weights}) > 1:
        return "the weights are not alike"
    if not all(weight.requires_grad for weight in weights):
        return "a weight is not trained"
    if any(uses[weight.data_ptr()] > 1 for weight in weights):
        return "a weight has another use"
    return why_not_seen_through(attention)


def join_projections(model: nn.Module) -> list[str | None]:
    """Let q, k and v multiply as one in compiled layers, where they fit.

    Args:
        model: a model of transformers whose weights are trained. Changed in place: the class of its attentions, and where their
            weights lie.

    Returns:
        For every attention of the decoder layers, why it stays as it is, or None.
    """
    parameters = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    uses = Counter(p.data_ptr() for p in parameters if type(p.data) is torch.Tensor)
    attentions: list[Any] = find_attentions(get_layers(model))
    reasons = [_why_not(attention, uses) for attention in attentions]
    for attention, reason in zip(attentions, reasons, strict=True):
        if reason is not None:
            continue
        original = read_original_forward(type(attention))
        rotation = find_rotation(attention, original)
        become(
            attention,
            forward=rotating_forward(original, rotation)
            if isinstance(rotation, Rotation)
            else wrapped_forward(original),
            apply_qkv=apply_joined_qkv,
            apply_qkv_rotated=apply_joined_qkv_rotated,
            apply_o=original_apply_o,
        )
        weights = [getattr(attention, name).weight for name in QKV]
        if not lie_in_a_row(weights):
            lay_in_a_row(weights)
            attention.register_state_dict_post_hook(_own_storages)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # where the weights were
    return reasons


def why_not_joined(cfg: DictDefault, config: PretrainedConfig, *, has_gpu: bool) -> str | None:
    """Why the projections of a run are left as they are, or None.

    Args:
        cfg: the config of the run.
        config: the model's.
        has_gpu: whether it will run on CUDA.
    """
    rules = (
        (bool(cfg.adapter), "frozen weights below an adapter"),
        (not runs_compiled(cfg, config, has_gpu=has_gpu), "the layers are not compiled"),
        (bool(cfg.load_in_8bit or cfg.load_in_4bit or getattr(config, "quantization_config", None)), "quantized weights"),
        (bool(cfg.fp8), "the linear layers have matmuls of their own"),
        (cfg.optimizer == "q_galore_adamw8bit", "the optimizer puts other memory under the weights"),
        *(
            (bool(cfg[key]), f"not tested with `{key}`")
            for key in ("fsdp", "fsdp_config", "deepspeed", "unfrozen_parameters", "spectrum_top_fraction", "lisa_n_layers",
                        "layer_offloading", "relora", "qat", "tiled_mlp", "selective_checkpointing")
        ),
        *(
            ((cfg[key] or 1) > 1, f"not tested with `{key}`")
            for key in ("tensor_parallel_size", "context_parallel_size", "dp_shard_size", "expert_parallel_size")
        ),
    )  # fmt: skip
    return next((reason for holds, reason in rules if holds), None)


def apply_joined_linear(cfg: DictDefault, model: nn.Module) -> None:
    """Join the projections of attentions if the run compiles its layers and trains all of their weights."""
    config: Any = model.config
    if why_not_joined(cfg, config, has_gpu=torch.cuda.is_available()) is not None:
        return
    reasons = join_projections(model)
    LOG.info(f"One matmul for q, k and v in {reasons.count(None)} of {len(reasons)} attention layers")
    for reason, count in Counter(filter(None, reasons)).most_common():
        LOG.debug(f"{count} of them run as plain layers because {reason}")
