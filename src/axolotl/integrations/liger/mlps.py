"""Gated MLPs, `down(act(gate(x)) * up(x))`, with activation and product in one kernel.

The kernel is that of `axolotl.kernels.glu`: it keeps the two inputs of the product for backward, not the activation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import nn

from axolotl.integrations.liger import swap
from axolotl.integrations.liger.swap import NOT_MADE_FOR, plain, random_numbers, small_copy, swap_each
from axolotl.kernels.glu import Activation, gated, gated_forward

_APART = ("gate_proj", "up_proj", "down_proj")
_JOINED = ("gate_up_proj", "down_proj")
_TOLERANCE = 1e-6


def read_projections(mlp: nn.Module) -> tuple[str, ...] | None:
    """The names of the projections, if the module has those of a gated MLP."""
    return next((names for names in (_APART, _JOINED) if all(name in mlp._modules for name in names)), None)


def read_activation(mlp: nn.Module, names: tuple[str, ...]) -> Activation | str:
    """The activation of a gated MLP, or a sentence that says why it is none."""
    others = [child for name, child in mlp._modules.items() if name not in names and child is not None]
    if mlp._parameters or any(next(child.parameters(), None) is not None for child in others):
        return "it has weights besides its projections"

    def linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
        # Without initial weights, which would be drawn from the generator of the run.
        made: Any = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, dtype=torch.float64)
        made.weight.requires_grad_(False).copy_(random_numbers(outputs, inputs, seed=seed))
        return made

    joined = linear(8, 12, 1)
    gate, up = joined.weight.chunk(2)
    children: dict[str, nn.Module] = {"gate_up_proj": joined, "down_proj": linear(6, 8, 2)}
    for name, weight in (("gate_proj", gate), ("up_proj", up)):
        children[name] = linear(8, 6, 3)
        children[name].weight.copy_(weight)  # type: ignore[operator]
    x = random_numbers(1, 5, 8)
    try:
        got = small_copy(mlp, children={name: children[name] for name in names}).forward(x)
    except NOT_MADE_FOR as error:
        return f"it does not take what a gated MLP takes ({type(error).__name__})"
    for act in get_args(Activation):
        wanted = children["down_proj"](gated_forward(x @ gate.T, x @ up.T, act))
        if (
            isinstance(got, torch.Tensor)
            and got.shape == wanted.shape
            and torch.allclose(got, wanted, _TOLERANCE, _TOLERANCE)
        ):
            return act
    return f"{type(mlp).__name__} computes something else than `down(act(gate) * up)`"


@functools.cache
def _mlp_forward(names: tuple[str, ...], act: Activation) -> Callable[..., torch.Tensor]:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not swap.runs_fused(hidden_states):
            return plain(self, hidden_states, *args, **kwargs)
        if names == _APART:
            gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        else:
            gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(gated(gate, up, act))

    return forward


def fuse_gated_mlps(model: nn.Module) -> list[str | None]:
    """Swap the gated MLPs of `model`. Returns, for each, why it stays as it is, or None."""

    def find_forward(mlp: nn.Module) -> Callable[..., torch.Tensor] | str:
        names = read_projections(mlp)
        assert names is not None
        act = read_activation(mlp, names)
        return _mlp_forward(names, act) if act in get_args(Activation) else act

    return swap_each(model, lambda module: read_projections(module) is not None, find_forward)
