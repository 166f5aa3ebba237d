"""Rotary embeddings in one kernel: the function `apply_rotary_pos_emb` of the module that the model's code is in.

It is the one thing here that belongs to a module and not to a model, so that what stands in its place is right for every
model: on a CPU, while compiling, and for shapes that the kernel does not know, the function of before runs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from axolotl.integrations.liger import swap
from axolotl.integrations.liger.swap import NOT_MADE_FOR, random_numbers

NAME = "apply_rotary_pos_emb"
_MARK = "_liger_original"

Rope = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def rotates_halves(function: Callable[..., Any]) -> bool:
    """Whether it is RoPE as the kernel computes it: the first half of a head turned with the second."""
    q, k = random_numbers(2, 4, 3, 16), random_numbers(2, 2, 3, 16, seed=1)
    # Not on a circle, so that cosine and sine cannot be mixed up.
    cos, sin = (random_numbers(2, 3, 8, seed=seed).repeat(1, 1, 2) for seed in (2, 3))

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    try:
        got = function(q, k, cos, sin)
    except NOT_MADE_FOR:
        return False
    return (
        isinstance(got, tuple)
        and len(got) == 2
        and all(
            isinstance(ours, torch.Tensor)
            and ours.shape == x.shape
            and torch.allclose(ours.double(), turned(x), 1e-5, 1e-5)
            for ours, x in zip(got, (q, k), strict=True)
        )
    )


def _fits(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whole heads, and one angle per position or per position and row."""
    return (
        q.dim() == 4
        and k.dim() == 4
        and cos.dim() == 3
        and cos.shape == sin.shape
        and cos.shape[-1] == q.shape[-1] == k.shape[-1]
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape[1] == q.shape[2]
    )


def _fused(original: Callable[..., Any], kernel: Rope) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not swap.runs_fused(q) or not _fits(q, k, cos, sin):
            return original(q, k, cos, sin, *args, **kwargs)
        return kernel(q, k, cos, sin)

    setattr(apply_rotary_pos_emb, _MARK, original)
    return apply_rotary_pos_emb


def _modules_with_rope(model: nn.Module) -> list[Any]:
    names = sorted({type(module).__module__ for module in model.modules()})
    return [sys.modules[name] for name in names if name in sys.modules and hasattr(sys.modules[name], NAME)]


def fuse_rope(model: nn.Module, kernel: Rope) -> list[str | None]:
    """Let the code of `model` rotate by `kernel`. Returns, for each module of code, why it stays as it is, or None."""
    results: list[str | None] = []
    for code in _modules_with_rope(model):
        function = getattr(code, NAME)
        original = getattr(function, _MARK, function)
        if rotates_halves(original):
            setattr(code, NAME, _fused(original, kernel))
            results.append(None)
        else:
            results.append(f"{code.__name__.rpartition('.')[2]} rotates in another way")
    return results


def restore_rope(model: nn.Module) -> None:
    """Undo `fuse_rope`."""
    for code in _modules_with_rope(model):
        function = getattr(code, NAME)
        setattr(code, NAME, getattr(function, _MARK, function))
