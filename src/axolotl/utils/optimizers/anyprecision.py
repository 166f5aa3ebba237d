"""AnyPrecision AdamW: AdamW whose moments have dtypes of their own, with Kahan summation for weights in low precision.

The optimizer of torchdistx (https://github.com/pytorch/torchdistx, `AnyPrecisionAdamW`), written from AdamW's equations and
Kahan's compensated summation (https://doi.org/10.1145/363707.363723): what a weight in bfloat16 cannot take of an update is
kept, and added to the next one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from axolotl.utils.optimizers.parameterwise import ParameterwiseOptimizer
from axolotl.utils.optimizers.state import keep_loaded_dtypes


class AnyPrecisionAdamW(ParameterwiseOptimizer):
    """The optimizer. The arithmetic of a step is in float32.

    Args:
        params: parameters or param groups.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled decay per step.
        use_kahan_summation: keep what is lost when an update is added to a weight.
        momentum_dtype: of the first moment.
        variance_dtype: of the second moment.
        compensation_buffer_dtype: of what was lost.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        use_kahan_summation: bool = False,
        momentum_dtype: torch.dtype = torch.float32,
        variance_dtype: torch.dtype = torch.float32,
        compensation_buffer_dtype: torch.dtype = torch.bfloat16,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"invalid AnyPrecisionAdamW arguments: {lr=}, {betas=}, {eps=}, {weight_decay=}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "use_kahan_summation": use_kahan_summation})
        self.dtypes = {
            "exp_avg": momentum_dtype,
            "exp_avg_sq": variance_dtype,
            "compensation": compensation_buffer_dtype,
        }
        keep_loaded_dtypes(self)

    def update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """One step of AdamW."""
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            names = ["exp_avg", "exp_avg_sq", *(["compensation"] if group["use_kahan_summation"] else [])]
            state.update({name: torch.zeros_like(param, dtype=self.dtypes[name]) for name in names})
        state["step"] += 1
        step, (beta1, beta2), gradient = float(state["step"]), group["betas"], grad.float()
        first = state["exp_avg"].float() * beta1 + gradient * (1 - beta1)
        second = state["exp_avg_sq"].float() * beta2 + gradient.square() * (1 - beta2)
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        denominator = (second / (1 - beta2**step)).sqrt() + group["eps"]
        before = param.to(torch.float32, copy=True)
        change = first / denominator * (-group["lr"] / (1 - beta1**step))
        change -= group["lr"] * group["weight_decay"] * before
        if group["use_kahan_summation"]:
            change += state["compensation"]
        param.copy_(before + change)
        if group["use_kahan_summation"]:
            state["compensation"].copy_(change - (param.float() - before))
