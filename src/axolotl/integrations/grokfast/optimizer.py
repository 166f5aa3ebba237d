"""Grokfast: the slow part of a gradient, amplified (https://arxiv.org/abs/2405.20233, algorithm 2, "Grokfast-EMA").

With a moving average mu of the gradients g: `mu <- alpha * mu + (1 - alpha) * g`, and the optimizer gets `g + lamb * mu`. The first
gradient begins the average.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from axolotl.exceptions import ConfigError

STATE_KEY = "grokfast_ema"


def filter_gradient(grad: torch.Tensor, ema: torch.Tensor | None, alpha: float, lamb: float) -> torch.Tensor:
    """Amplify `grad`, which is changed in place.

    Args:
        grad: the gradient of a parameter.
        ema: the average so far, fp32, changed in place; None at the first step.
        alpha: memory of the average, 0 to 1.
        lamb: weight of the average.

    Returns:
        The average, fp32.
    """
    wide = grad.detach().float()
    if ema is None:
        ema = wide.clone()
    else:
        ema.lerp_(wide, 1.0 - alpha)
    grad.copy_(wide.add(ema, alpha=lamb))
    return ema


@torch.no_grad()
def gradfilter_ema(
    m: nn.Module, grads: dict[str, torch.Tensor] | None = None, alpha: float = 0.98, lamb: float = 2.0
) -> dict[str, torch.Tensor]:
    """Amplify the gradients of a model in place, between backward and the optimizer's step.

    Args:
        m: the model.
        grads: what the call before returned; None at the first step.
        alpha: memory of the average.
        lamb: weight of the average.

    Returns:
        The averages by name of parameter, for the next call.
    """
    before = grads or {}
    return {
        name: filter_gradient(parameter.grad, before.get(name), alpha, lamb)
        for name, parameter in m.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


class GrokfastCallback(TrainerCallback):
    """Amplifies gradients as the first thing in each step of the optimizer: after clipping and unscaling, and not in steps that
    are skipped. The averages are states of the optimizer, so that checkpoints hold them.

    Args:
        alpha: memory of the average.
        lamb: weight of the average.
    """

    def __init__(self, alpha: float, lamb: float):
        self.alpha = alpha
        self.lamb = lamb
        self._new: dict[torch.Tensor, torch.Tensor] = {}
        self._handles: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"The grokfast plugin changes gradients before the step of a PyTorch optimizer, and this is {type(optimizer).__name__}. "
                "Write `optimizer: adamw_torch_fused`."
            )
        self._handles = [
            optimizer.register_step_pre_hook(self._amplify),
            optimizer.register_step_post_hook(self._keep),
        ]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _amplify(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter.grad is None:
                continue
            known = optimizer.state[parameter].get(STATE_KEY) if parameter in optimizer.state else None
            ema = filter_gradient(parameter.grad, known, self.alpha, self.lamb)
            if known is None:
                self._new[parameter] = ema

    def _keep(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Averages become states after the first step: optimizers take a parameter without states for a new one."""
        for parameter, ema in self._new.items():
            optimizer.state[parameter][STATE_KEY] = ema
        self._new.clear()
