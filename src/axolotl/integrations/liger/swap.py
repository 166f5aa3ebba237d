"""Layers that compute the same in fewer kernels: an instance becomes one of a subclass with another forward.

What a layer computes is asked of the layer itself, on a shallow copy with small random weights, and compared with a formula.
So an architecture needs no entry in a list, and one that computes something of its own stays as it is. Nothing is set on
instances: a copy of the model is a copy, and `restore` gives every module its class back.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# What a forward may raise when it is given weights or inputs that it is not made for.
NOT_MADE_FOR = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError)

_BASE = "_liger_base"


def runs_fused(x: torch.Tensor) -> bool:
    """Whether the kernels take over: on CUDA, and not where a compiler fuses the layer with its neighbours."""
    return x.is_cuda and not torch.compiler.is_compiling()


@functools.cache
def _subclass(cls: type[nn.Module], forward: Callable[..., torch.Tensor]) -> type[nn.Module]:
    return type(cls.__name__, (cls,), {_BASE: cls, "__module__": cls.__module__, "forward": forward})


def become(module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    """Let `module` compute by `forward`, a function of itself and its inputs that may call `plain`."""
    module.__class__ = _subclass(type(module), forward)


def plain(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward that the module came with."""
    return getattr(type(module), _BASE).forward(module, *args, **kwargs)


def restore(model: nn.Module) -> None:
    """Undo `become` for every module of `model`."""
    for module in model.modules():
        if hasattr(type(module), _BASE):
            module.__class__ = getattr(type(module), _BASE)


def swap_each(
    model: nn.Module,
    is_wanted: Callable[[nn.Module], bool],
    find_forward: Callable[[nn.Module], Callable[..., torch.Tensor] | str],
) -> list[str | None]:
    """Let the modules of a kind compute by another forward, each by itself: those of one class may differ in an attribute.

    Args:
        model: its modules are changed in place.
        is_wanted: whether a module is of the kind.
        find_forward: the forward that computes what a module does, for `become`; or why there is none.

    Returns:
        For each module of the kind, why it stays as it is, or None.
    """
    results: list[str | None] = []
    for module in [module for module in model.modules() if is_wanted(module)]:
        found = why_not_swapped(module) or find_forward(module)
        if not isinstance(found, str):
            become(module, found)
        results.append(found if isinstance(found, str) else None)
    return results


def why_not_swapped(module: nn.Module) -> str | None:
    """Why a module must stay as it is, whatever it computes; None when it may be swapped."""
    if hasattr(type(module), _BASE):
        return "it is swapped already"
    if hasattr(type(module), "_lora_kernels_base"):
        return "the LoRA kernels run it"
    if "forward" in vars(module):
        return "somebody else has replaced its forward"
    return None


def small_copy(
    module: nn.Module,
    parameters: dict[str, nn.Parameter] | None = None,
    children: dict[str, nn.Module] | None = None,
) -> Any:
    """A shallow copy with other parameters and children, which leaves the original alone."""
    made = copy.copy(module)
    made.__dict__["_parameters"] = {**module._parameters, **(parameters or {})}
    made.__dict__["_modules"] = {**module._modules, **(children or {})}
    return made


def random_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, float64, the same on every rank and without touching the global generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
