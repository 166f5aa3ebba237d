"""AdamC: AdamW with corrected weight decay of normalised layers (Defazio, https://arxiv.org/abs/2506.02285).

A layer whose output is normalised turns at a rate set by `lr * weight_decay`; as the learning rate falls, AdamW's decay
lets its gradients grow. The correction decays such layers by `lr^2 / max_lr * weight_decay` instead of `lr * weight_decay`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from axolotl.integrations.base import BaseOptimizerFactory
from axolotl.utils.optimizers.groups import head_parameters, param_groups_of, split_groups


class AdamC(AdamW):
    """The optimizer. Groups with `normalized: True` get the correction, all others are AdamW's.

    Args:
        params: parameters or param groups. `max_lr`, the peak of the schedule, is the `lr` that a group starts with.
        lr, betas, eps, weight_decay, **kwargs: as `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **kwargs: Any,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **kwargs)
        for group in self.param_groups:
            group.setdefault("normalized", False)
            group.setdefault("max_lr", group["lr"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Returns what the closure returned."""
        given = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            if group["normalized"] and group["max_lr"]:
                group["weight_decay"] *= group["lr"] / group["max_lr"]
        try:
            return super().step(closure)
        finally:
            for group, weight_decay in zip(self.param_groups, given, strict=True):
                group["weight_decay"] = weight_decay


class AdamCFactory(BaseOptimizerFactory):
    """Creates `AdamC`: the correction for all parameters that decay except the output head, whose output is not normalised."""

    def __call__(
        self, opt_model: nn.Module, training_args: Any, *, lr: float, weight_decay: float, **kwargs: Any
    ) -> Optimizer:
        """Create the optimizer. `kwargs` are those of `AdamC`."""
        head = head_parameters(opt_model)
        groups = param_groups_of(opt_model, training_args, lr, weight_decay)
        groups = split_groups(groups, lambda p: id(p) not in head, lambda normalized: {"normalized": normalized})
        return AdamC(groups, lr=lr, weight_decay=weight_decay, **kwargs)
