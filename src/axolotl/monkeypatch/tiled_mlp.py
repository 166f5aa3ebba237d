"""Tiled MLP: the feed-forward of a layer runs over pieces of the sequence, one after the other.

An MLP treats every token by itself, so that cutting the sequence changes nothing but the memory: the wide intermediates exist
for one piece at a time, in the forward pass and, recomputed, in the backward pass. From Arctic Long Sequence Training
(https://arxiv.org/abs/2506.13996, section 3.1), with torch's checkpoint for the pieces, so that any MLP fits: adapters, biases,
quantized weights, fused kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from axolotl.exceptions import ConfigError
from axolotl.monkeypatch.lora_kernels import get_layers
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

MLP_NAMES = ("mlp", "feed_forward", "ffn", "fc")
MARK = "_axolotl_untiled_forward"


def num_shards_for(num_tokens: int, hidden_size: int) -> int:
    """Pieces for a sequence: one per `hidden_size` tokens, so that a piece's input is about square."""
    return max(1, math.ceil(num_tokens / max(hidden_size, 1)))


def tiled_forward(
    forward: Callable[[torch.Tensor], torch.Tensor], num_shards: int | None
) -> Callable[..., torch.Tensor]:
    """`forward`, a function of each token by itself, over pieces of the sequence.

    Args:
        forward: (..., T, H) -> (..., T, H).
        num_shards: number of pieces; None takes `num_shards_for`.
    """

    def tiled(hidden_states: torch.Tensor) -> torch.Tensor:
        num_tokens, hidden_size = hidden_states.shape[-2], hidden_states.shape[-1]
        pieces = min(num_shards or num_shards_for(num_tokens, hidden_size), num_tokens)
        if pieces <= 1:
            return forward(hidden_states)
        parts = hidden_states.chunk(pieces, dim=-2)
        if not torch.is_grad_enabled():
            return torch.cat([forward(part) for part in parts], dim=-2)
        # Weights that train need no reentrant input: each piece is recomputed by itself, the last one first.
        done = [checkpoint(forward, part, use_reentrant=False) for part in parts]
        return torch.cat(done, dim=-2)

    return tiled


def _is_dense(mlp: nn.Module) -> bool:
    """Whether the module takes tokens one by one; a router counts them over the batch."""
    return not any(
        isinstance(child, nn.ModuleList) or any(word in name for word in ("expert", "router"))
        for name, child in mlp.named_children()
    )


def apply_tiled_mlp(model: nn.Module, num_shards: int | None = None) -> int:
    """Tile the MLP of every decoder layer. Doing it again replaces the number of pieces.

    Args:
        model: a transformers model or a peft model around one.
        num_shards: pieces of a sequence; None chooses by its length.

    Returns:
        How many MLPs are tiled.

    Raises:
        ConfigError: the model has none that can be.
    """
    num_tiled = 0
    for layer in get_layers(model):
        mlp = next((child for name, child in layer.named_children() if name in MLP_NAMES), None)
        if mlp is None or not _is_dense(mlp):
            continue
        forward = vars(mlp).get(MARK) or mlp.forward
        setattr(mlp, MARK, forward)
        mlp.forward = tiled_forward(forward, num_shards)
        num_tiled += 1
    if not num_tiled:
        raise ConfigError(
            "`tiled_mlp: true` cannot be used with this model: its layers have no dense MLP that works token by token (experts "
            "route over the whole batch). Write `tiled_mlp: false`."
        )
    LOG.debug(f"{num_tiled} MLPs run in pieces of the sequence.")
    return num_tiled


def remove_tiled_mlp(model: nn.Module) -> None:
    """Undo `apply_tiled_mlp`."""
    for module in model.modules():
        if vars(module).pop(MARK, None) is not None:
            del module.forward
