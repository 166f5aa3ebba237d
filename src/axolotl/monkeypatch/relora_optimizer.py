"""What the optimizer forgets at a ReLoRA restart.

Moments that belong to the merged matrices would push the new ones in old directions. `magnitude` drops the smallest entries of
each moment, `random` and `reset` any (section 3 of https://arxiv.org/abs/2307.05695; `reset` drops nearly all).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

# Share of each moment that is dropped unless `relora_prune_ratio` says another.
PRUNE_RATIOS = {"magnitude": 0.9, "random": 0.9, "reset": 0.999}


@torch.no_grad()
def prune_optimizer_state(
    optimizer: Any, parameters: Iterable[nn.Parameter], method: str, ratio: float, *, seed: int
) -> None:
    """Zero a share of the moments of `parameters`, in place. Counters of steps stay.

    Args:
        optimizer: of torch, bitsandbytes (also 8 bits) or torchao; moments have the shape of their parameter.
        parameters: whose moments are pruned.
        method: `magnitude`, `random` or `reset`.
        ratio: share to drop, 0 to 1.
        seed: of the random choice; the same on every rank.

    Raises:
        ValueError: unknown method.
    """
    if method not in PRUNE_RATIOS:
        raise ValueError(f"Unknown prune method {method!r}. One of: {', '.join(PRUNE_RATIOS)}.")
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        pruned = 0
        for name, moment in state.items():
            if not torch.is_tensor(moment) or moment.shape != parameter.shape:
                continue
            values = _values(state, name, moment)
            if values is None:
                continue
            kept = _keep(values, method, ratio, generator)
            _set_zero(state, name, moment, ~kept)
            pruned += 1
        if state and not pruned:
            LOG.warning_once(
                f"{type(optimizer).__name__} keeps no moments of the shape of its parameters: a ReLoRA restart drops nothing. "
                "AdamW in 32 or 8 bits has such moments."
            )


def _keep(values: torch.Tensor, method: str, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Boolean mask of the entries to keep, `round(numel * (1 - ratio))` of them."""
    numel = values.numel()
    num_kept = round(numel * (1 - ratio))
    if method == "magnitude":
        order = values.abs().flatten().topk(num_kept).indices
    else:
        order = torch.randperm(numel, generator=generator)[:num_kept].to(values.device)
    mask = torch.zeros(numel, dtype=torch.bool, device=values.device)
    mask[order] = True
    return mask.reshape(values.shape)


def _codes(state: dict[str, Any], name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(values of the codes, largest value of each block) of an 8-bit moment of bitsandbytes."""
    number = name.removeprefix("state")
    table, largest = state.get(f"qmap{number}"), state.get(f"absmax{number}")
    return None if table is None or largest is None else (table, largest)


def _is_packed(moment: torch.Tensor) -> bool:
    """Whether a moment is a tensor of torchao, which packs its values."""
    return type(moment) is not torch.Tensor


def _values(state: dict[str, Any], name: str, moment: torch.Tensor) -> torch.Tensor | None:
    """A moment as floats; None for what is no moment."""
    if moment.dtype == torch.uint8:
        codes = _codes(state, name)
        if codes is None:
            return None
        table, largest = codes
        block = -(-moment.numel() // largest.numel())
        block = next(size for size in (256, 512, 1024, 2048, 4096, 2**62) if size >= block)
        scale = largest.repeat_interleave(min(block, moment.numel()))[: moment.numel()]
        return (table[moment.flatten().long()] * scale).reshape(moment.shape)
    if _is_packed(moment):
        return moment.dequantize()
    return moment if moment.is_floating_point() else None


def _set_zero(state: dict[str, Any], name: str, moment: torch.Tensor, where: torch.Tensor) -> None:
    if moment.dtype == torch.uint8:
        codes = _codes(state, name)
        assert codes is not None
        moment[where] = int(codes[0].abs().argmin())
    elif _is_packed(moment):
        moment.copy_(moment.dequantize().masked_fill(where, 0.0))
    else:
        moment.masked_fill_(where, 0.0)
