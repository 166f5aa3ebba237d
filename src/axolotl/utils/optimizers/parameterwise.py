"""What steps of our own optimizers share: the closure, and one parameter after the other."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """The loss that the closure of a step computes, with gradients also where the step has none; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class ParameterwiseOptimizer(Optimizer, abc.ABC):
    """An optimizer whose subclass says how one parameter is updated."""

    @abc.abstractmethod
    def update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Update a parameter, and its `self.state`, in place. Called without gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter with a gradient. Returns what the closure returned."""
        loss = run_closure(closure)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, param.grad, group)
        return loss
