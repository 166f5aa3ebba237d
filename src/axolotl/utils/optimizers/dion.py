"""Dion: orthonormal updates of low rank (Ahn, Xu et al., https://arxiv.org/abs/2504.05295).

Written from Algorithm 1 of the paper: one power iteration per step finds the leading directions of the momentum, what the
update leaves out stays in the momentum (error feedback).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from axolotl.utils.optimizers.matrix import check_matrices, shard_like, whole
from axolotl.utils.optimizers.parameterwise import ParameterwiseOptimizer


class Dion(ParameterwiseOptimizer):
    """The optimizer, for matrices only.

    Each step, with B = M + G (m x n) and Q (n x r) from the step before::

        P = orthonormal columns of B Q,   R = B^T P,   M = B - (1 - momentum) P R^T
        Q = R with columns of length 1,   X = (1 - lr * weight_decay) X - lr * sqrt(m / n) P Q^T

    The state is the momentum, in the dtype of the parameter, and Q in float32, the same on all ranks. All products are in
    float32. A sharded matrix is gathered for its update.

    Args:
        params: two-dimensional parameters, or param groups of them.
        lr: learning rate; the paper's is 0.01, and depends little on the size of the model.
        momentum: share of the captured momentum that is kept.
        rank_fraction: r over min(m, n).
        rank_multiple_of: r is rounded up to a multiple of this, but never above min(m, n).
        weight_decay: decoupled decay per step.
        eps: smallest length of a column that is divided by.
        seed: of the first Q.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.95,
        rank_fraction: float = 1.0,
        rank_multiple_of: int = 1,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        seed: int = 0,
    ):
        if lr < 0 or weight_decay < 0 or not 0 <= momentum <= 1 or not 0 < rank_fraction <= 1 or rank_multiple_of < 1:
            raise ValueError(
                f"invalid Dion arguments: {lr=}, {momentum=}, {rank_fraction=}, {rank_multiple_of=}, {weight_decay=}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "rank_fraction": rank_fraction,
            "rank_multiple_of": rank_multiple_of,
            "weight_decay": weight_decay,
            "eps": eps,
            "seed": seed,
        }
        super().__init__(params, defaults)
        check_matrices(self.param_groups)

    def update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """One step of the algorithm."""
        rows, columns = param.shape
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
            state["Q"] = _first_basis(param, group)
        momentum_MN = state["momentum"].add_(grad)
        B_MN = whole(momentum_MN).float()
        P_MR, _ = torch.linalg.qr(B_MN @ state["Q"])
        R_NR = B_MN.T @ P_MR
        B_MN -= (1 - group["momentum"]) * (P_MR @ R_NR.T)
        momentum_MN.copy_(shard_like(B_MN.to(param.dtype), param))
        state["Q"] = R_NR / R_NR.norm(dim=0, keepdim=True).clamp(min=group["eps"])
        update_MN = P_MR @ state["Q"].T
        param.mul_(1 - group["lr"] * group["weight_decay"])
        scale = group["lr"] * math.sqrt(rows / columns)
        param.add_(shard_like(update_MN.to(param.dtype), param), alpha=-scale)


def _first_basis(param: Tensor, group: dict[str, Any]) -> Tensor:
    """The same random directions on every rank, whatever else has drawn random numbers."""
    smaller = min(param.shape)
    multiple = group["rank_multiple_of"]
    rank = min(math.ceil(group["rank_fraction"] * smaller / multiple) * multiple, smaller)
    generator = torch.Generator().manual_seed(group["seed"])
    basis_NR = torch.randn(param.shape[1], rank, generator=generator)
    return torch.linalg.qr(basis_NR)[0].to(param.device)
