"""Optimizer steps inside the backward pass: each parameter is updated as soon as its gradient is there, and the gradient freed.

Never more than one whole gradient is in memory. In exchange there is no gradient norm to clip by, no accumulation over
micro-batches, and no loss scale that could tell a bad step beforehand.
"""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer


def step_in_backward(optimizer: Optimizer) -> None:
    """Let `optimizer` update each of its parameters when its gradient is complete.

    When a hook runs, its parameter is the only one that has a gradient, so that an ordinary `step` updates it alone. Groups,
    state and schedule are those of the optimizer itself; its `step` after the backward pass finds nothing to do.

    Args:
        optimizer: one whose `step` passes over parameters without a gradient.
    """

    def update(parameter: nn.Parameter) -> None:
        optimizer.step()
        parameter.grad = None

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(update)
