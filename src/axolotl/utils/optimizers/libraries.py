"""Optimizers of libraries that need more than a call: LOMO takes the model, others leave their state out of checkpoints.

LOMO and AdaLomo (https://arxiv.org/abs/2306.09782, https://arxiv.org/abs/2310.10195) are plain and adaptive descent inside
the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from axolotl.exceptions import ConfigError
from axolotl.integrations.base import BaseOptimizerFactory

# Moments that AdaLomo keeps outside the state of an optimizer, by name of the parameter.
MOMENTS = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")


class LomoFactory(BaseOptimizerFactory):
    """Creates LOMO or AdaLomo, which take the model itself and update it while gradients are computed."""

    def __call__(
        self, opt_model: nn.Module, training_args: Any, *, optimizer_cls: type[Optimizer], lr: float, **kwargs: Any
    ) -> Optimizer:
        """Create the optimizer.

        Args:
            opt_model: the model.
            training_args: not needed.
            optimizer_cls: `Lomo` or `AdaLomo`.
            lr: learning rate; the trainer passes that of the schedule at each step.
            **kwargs: arguments of `optimizer_cls`.

        Raises:
            ConfigError: AdaLomo without a CUDA device, where the library puts its moments.
        """
        if optimizer_cls.__name__ == "AdaLomo":
            if not torch.cuda.is_available():
                raise ConfigError("`optimizer: adalomo` needs a CUDA device. Write `optimizer: adafactor` or `lomo`.")
            optimizer_cls = saves_moments(optimizer_cls)
        return optimizer_cls(opt_model, lr=lr, **kwargs)  # type: ignore[arg-type]


def saves_moments(adalomo_cls: type[Any]) -> type[Any]:
    """AdaLomo whose checkpoints hold its moments and its step count, which the library leaves out."""

    class SavedAdaLomo(adalomo_cls):
        def state_dict(self) -> dict[str, Any]:
            own = {name: dict(getattr(self, name)) for name in MOMENTS}
            return {**super().state_dict(), "adalomo": {"step_num": self.step_num, **own}}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            if "adalomo" not in state_dict:
                raise ValueError("it has no moments of AdaLomo")
            state_dict = dict(state_dict)
            own = state_dict.pop("adalomo")
            super().load_state_dict(state_dict)
            self.step_num = own["step_num"]
            for name in MOMENTS:
                moments = getattr(self, name)
                for parameter, value in own[name].items():
                    moments[parameter].copy_(value)

    return SavedAdaLomo


def keeps_training_point(schedule_free_cls: type[Any]) -> type[Any]:
    """A schedule-free optimizer that goes on exactly where it stopped to evaluate or to save.

    The library computes the point at which it trains back from the average, and rounds: one more evaluation would make another
    run. The copy takes the room of the gradients, which are freed by then; checkpoints hold it beside the other states.
    """

    class SavedScheduleFree(schedule_free_cls):
        @torch.no_grad()
        def eval(self) -> None:
            for group in (group for group in self.param_groups if group["train_mode"]):
                for param in group["params"]:
                    if "z" in self.state[param]:
                        self.state[param]["y"] = param.clone()
            super().eval()

        @torch.no_grad()
        def train(self) -> None:
            super().train()
            for param, state in self.state.items():
                if "y" in state:
                    param.copy_(state.pop("y"))

    return SavedScheduleFree


def saves_group_state(grokadamw_cls: type[Any]) -> type[Any]:
    """GrokAdamW whose checkpoints hold its moments by parameter. The library keeps them in its param groups, by object."""

    class SavedGrokAdamW(grokadamw_cls):
        def state_dict(self) -> dict[str, Any]:
            kept = [group.pop("state", {}) for group in self.param_groups]
            for states in kept:
                self.state.update(states)
            try:
                return super().state_dict()
            finally:
                for group, states in zip(self.param_groups, kept, strict=True):
                    group["state"] = states

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                group["state"] = {param: self.state[param] for param in group["params"] if param in self.state}

    return SavedGrokAdamW
