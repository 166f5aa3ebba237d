"""Rows that `unfrozen_parameters` leaves out stay what they were, whatever the optimizer does to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback


class FrozenRowsCallback(TrainerCallback):
    """Puts frozen rows back after each optimizer step. Their gradient is zero, but weight decay needs none.

    Args:
        frozen: parameters that train in part, each with the numbers of its frozen rows (int64).
    """

    def __init__(self, frozen: list[tuple[nn.Parameter, torch.Tensor]]):
        self.frozen = frozen
        self._kept: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, numbers in self.frozen:
            rows = numbers.to(parameter.device)
            self._kept.append((parameter, rows, parameter.detach()[rows].clone()))

    @torch.no_grad()
    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: torch.optim.Optimizer | None = None, **kwargs: Any
    ) -> None:
        for parameter, rows, values in self._kept:
            parameter[rows] = values
            # A schedule-free optimizer has a second point, which decays too and is mixed into the weights that are saved.
            second = {} if optimizer is None else optimizer.state.get(parameter, {})
            if "z" in second:
                second["z"][rows] = values
