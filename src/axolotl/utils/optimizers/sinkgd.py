"""SinkGD: stateless descent along gradients whose rows and columns are normalised in turn.

Scetbon et al., "Gradient Multi-Normalization for Stateless and Scalable LLM Training", https://arxiv.org/abs/2502.06742,
Algorithm 3 (SR-Sinkhorn) and section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from axolotl.utils.optimizers.matrix import check_matrices, shard_like, whole
from axolotl.utils.optimizers.parameterwise import ParameterwiseOptimizer


class SinkGD(ParameterwiseOptimizer):
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

    def update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """One step along the normalised gradient."""
        update = sinkhorn_normalise(whole(grad).float(), group["sinkhorn_iters"], group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(shard_like(update.to(param.dtype), param), alpha=-group["lr"] * group["sinkgd_lr_scale"])


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
