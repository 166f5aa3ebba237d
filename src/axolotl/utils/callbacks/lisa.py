"""LISA: train a few layers at a time (Pan et al., https://arxiv.org/abs/2403.17919)."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from torch import nn
from transformers import Trainer, TrainerCallback

from axolotl.exceptions import ConfigError
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


def lisa_callback_factory(trainer: Trainer) -> type[TrainerCallback]:
    """The callback class for a trainer."""

    class LISACallback(TrainerCallback):
        """Freezes all decoder layers but `n_layers`, drawn anew every `step_interval` steps.

        Args:
            n_layers: layers that train at a time.
            step_interval: steps between draws.
            layers_attribute: path of the decoder layers within the model.
        """

        def __init__(self, n_layers: int, step_interval: int, layers_attribute: str | None = None):
            self.n_layers = n_layers
            self.step_interval = step_interval
            self.layers_attribute = layers_attribute or "model.layers"
            self.trainer = trainer
            self.layers = find_layers(trainer.model, self.layers_attribute)
            if n_layers > len(self.layers):
                raise ConfigError(
                    f"`lisa_n_layers: {n_layers}` is more than the {len(self.layers)} layers of the model."
                )

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % self.step_interval == 0 or state.global_step == 1:
                self.switch_active_layers(args.seed, state.global_step)

        def switch_active_layers(self, seed: int, step: int) -> None:
            """Draw the active layers of a step. The draw follows from seed and step: a resumed run draws the same."""
            active = np.random.default_rng((seed, step)).choice(len(self.layers), self.n_layers, replace=False)
            for index, layer in enumerate(self.layers):
                layer.requires_grad_(index in active)
            LOG.info(f"LISA trains the layers {sorted(active.tolist())} from step {step + 1} on.")

    return LISACallback


def find_layers(model: nn.Module, path: str) -> nn.ModuleList:
    """The decoder layers at an attribute path."""
    try:
        return operator.attrgetter(path)(model)
    except AttributeError as error:
        raise ConfigError(f"`lisa_layers_attribute: {path}`: the model has no such part ({error}).") from error
