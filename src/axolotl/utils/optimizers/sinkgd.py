"""SinkGD: stateless descent along gradients whose rows and columns are normalised in turn.

Scetbon et al., "Gradient Multi-Normalization for Stateless and Scalable LLM Training", https://arxiv.org/abs/2502.06742,
Algorithm 3 (SR-Sinkhorn) and section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from axolotl.utils.optimizers.matrix import check_matrices, shard_like, whole


class SinkGD(Optimizer):
    """The optimizer, for matrices only. It has no state. A sharded matrix is gathered for its update.

    Args:
        params: two-dimensional parameters, or param groups of them.
        lr: learning rate, that of the AdamW beside it.
        sinkhorn_iters: rounds of normalisation.
        sinkgd_lr_scale: factor of `lr` for the update; the paper's is 0.05.
        weight_decay: decoupled decay per step, `lr * weight_decay`.
        eps: smallest length that is divided by.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        sinkhorn_iters: int = 5,
        sinkgd_lr_scale: float = 0.05,
        weight_decay: float = 0.0,
        eps: float = 1e-12,
    ):
        if lr < 0 or weight_decay < 0 or sinkhorn_iters < 1 or sinkgd_lr_scale <= 0:
            raise ValueError(f"invalid SinkGD arguments: {lr=}, {sinkhorn_iters=}, {sinkgd_lr_scale=}, {weight_decay=}")
        defaults = {
            "lr": lr,
            "sinkhorn_iters": sinkhorn_iters,
            "sinkgd_lr_scale": sinkgd_lr_scale,
            "weight_decay": weight_decay,
            "eps": eps,
        }
        super().__init__(params, defaults)
        check_matrices(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Returns what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                update = sinkhorn_normalise(whole(param.grad).float(), group["sinkhorn_iters"], group["eps"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                update = shard_like(update.to(param.dtype), param)
                param.add_(update, alpha=-group["lr"] * group["sinkgd_lr_scale"])
        return loss


def sinkhorn_normalise(gradient_MN: Tensor, iterations: int, eps: float = 1e-12) -> Tensor:
    """Give each row the length sqrt(n), then each column the length sqrt(m), `iterations` times.

    Args:
        gradient_MN: a matrix, m x n.
        iterations: rounds.
        eps: smallest length that is divided by; a row or column of zeros stays zero.

    Returns:
        The normalised matrix. Its entries have a root mean square of 1.
    """
    rows, columns = gradient_MN.shape
    normed_MN = gradient_MN
    for _ in range(iterations):
        normed_MN = normed_MN * (math.sqrt(columns) / normed_MN.norm(dim=1, keepdim=True).clamp(min=eps))
        normed_MN = normed_MN * (math.sqrt(rows) / normed_MN.norm(dim=0, keepdim=True).clamp(min=eps))
    return normed_MN
