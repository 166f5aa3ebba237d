"""PyTorch helpers of StableLM's attention. Old name for the rest: see axolotl._moved."""

from __future__ import annotations

import torch

from axolotl._moved import old_name

__getattr__ = old_name(__name__)


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Repeat each key head: (B, K, T, D) -> (B, K * n_rep, T, D), as `torch.repeat_interleave(x, dim=1, repeats=n_rep)`."""
    if n_rep == 1:
        return hidden_states
    return hidden_states.repeat_interleave(n_rep, dim=1)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Rotate half the hidden dims: (..., [a, b]) -> (..., [-b, a])."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
