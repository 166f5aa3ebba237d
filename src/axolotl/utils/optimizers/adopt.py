"""ADOPT: Adam that converges with any beta2 (Taniguchi et al., https://arxiv.org/abs/2411.02853).

Written from Algorithm 2 of the paper, with its clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from axolotl.utils.optimizers.parameterwise import ParameterwiseOptimizer


def default_clip(step: float) -> float:
    """Clip value of the paper's practical version: step ** 0.25."""
    return step**0.25


class ADOPT(ParameterwiseOptimizer):
    """The optimizer.

    Args:
        params: parameters or param groups.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: lower bound of the denominator.
        clip_lambda: step -> largest absolute value of a normalised gradient; None for no clipping.
        weight_decay: decay per step.
        decouple: decay the weights themselves (as AdamW) instead of adding to the gradient.
        foreach, maximize, capturable, differentiable, fused: `maximize` is honoured; the others are accepted for
            compatibility, this version always updates parameter by parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        clip_lambda: Callable[[float], float] | None = default_clip,
        weight_decay: float = 0.0,
        decouple: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ):
        if float(lr) < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"invalid ADOPT arguments: {lr=}, {betas=}, {eps=}, {weight_decay=}")
        del foreach, capturable, differentiable, fused
        self.clip_lambda = clip_lambda
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decouple": decouple,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """One step of `adopt`."""
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        adopt(
            [param],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [state["step"]],
            clip_lambda=self.clip_lambda,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            decouple=group["decouple"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


def adopt(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    foreach: bool | None = None,
    capturable: bool = False,
    differentiable: bool = False,
    fused: bool | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    has_complex: bool = False,
    *,
    beta1: float,
    beta2: float,
    lr: float | Tensor,
    clip_lambda: Callable[[float], float] | None,
    weight_decay: float,
    decouple: bool,
    eps: float,
    maximize: bool,
) -> None:
    """One ADOPT update of every parameter, in place. The first step only initialises the second moment.

    Args:
        params, grads: parameters and their gradients, same shapes.
        exp_avgs, exp_avg_sqs: first and second moments, updated.
        state_steps: float32 scalars, updated.
        foreach, capturable, differentiable, fused, grad_scale, found_inf, has_complex: accepted for compatibility; not
            needed by an update parameter by parameter.
        clip_lambda, beta1, beta2, lr, weight_decay, decouple, eps, maximize: as `ADOPT`.
    """
    for param, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, state_steps, strict=True):
        grad = -grad if maximize else grad
        if weight_decay and not decouple:
            grad = grad.add(param, alpha=weight_decay)
        if step == 0:
            exp_avg_sq.addcmul_(grad, grad)
            step += 1
            continue
        if weight_decay and decouple:
            param.mul_(1 - lr * weight_decay)
        normed = grad / exp_avg_sq.sqrt().clamp(min=eps)
        if clip_lambda is not None:
            bound = clip_lambda(float(step))
            normed.clamp_(-bound, bound)
        exp_avg.lerp_(normed, 1 - beta1)
        param.add_(exp_avg, alpha=-float(lr))
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step += 1
