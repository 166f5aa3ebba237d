"""LISA: train a few layers at a time (Pan et al., https://arxiv.org/abs/2403.17919)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container
from functools import partial
from typing import Any

import numpy as np
from torch import nn
from transformers import Trainer, TrainerCallback

from axolotl.exceptions import ConfigError
from axolotl.loaders.utils import plain_model
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class LISACallback(TrainerCallback):
    """Freezes all decoder layers but `n_layers`, drawn anew every `step_interval` steps.

    What was frozen from the start stays frozen. The optimizer forgets a layer that is frozen, as in the paper: its
    moments take no memory, and a layer that returns starts afresh.

    Args:
        trainer: whose model is trained.
        n_layers: layers that train at a time.
        step_interval: steps between draws; the first draw holds for one step.
        layers_attribute: path of the decoder layers within the model.
    """

    def __init__(self, trainer: Trainer, n_layers: int, step_interval: int, layers_attribute: str | None = None):
        self.n_layers = n_layers
        self.step_interval = step_interval
        self.layers_attribute = layers_attribute or "model.layers"
        layers = find_layers(trainer.model, self.layers_attribute)
        trained = [[parameter for parameter in layer.parameters() if parameter.requires_grad] for layer in layers]
        self.layers = {index: parameters for index, parameters in enumerate(trained) if parameters}
        if n_layers > len(self.layers):
            frozen = len(layers) - len(self.layers)
            raise ConfigError(
                f"`lisa_n_layers: {n_layers}` is more than the {len(self.layers)} layers "
                + (f"that are not frozen from the start, as {frozen} are." if frozen else "of the model.")
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the draw that a resumed run was in."""
        if state.global_step:
            self.switch_active_layers(args.seed, self.last_draw(state.global_step), kwargs.get("optimizer"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.last_draw(state.global_step) == state.global_step:
            self.switch_active_layers(args.seed, state.global_step, kwargs.get("optimizer"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._train(self.layers)

    def last_draw(self, step: int) -> int:
        """The latest step up to `step` at which layers are drawn."""
        return max(step - step % self.step_interval, min(step, 1))

    def switch_active_layers(self, seed: int, step: int, optimizer: Any = None) -> None:
        """Draw the active layers of a step. The draw follows from seed and step: a resumed run draws the same."""
        draw = np.random.default_rng((seed, step)).choice(list(self.layers), self.n_layers, replace=False)
        active = sorted(draw.tolist())
        self._train(active)
        if optimizer is not None:
            rest = getattr(optimizer, "eval", None)
            if rest is not None:
                rest()  # a schedule-free optimizer leaves a layer at its average
            for index, layer in self.layers.items():
                for parameter in () if index in active else layer:
                    optimizer.state.pop(parameter, None)
        LOG.info(f"LISA trains the layers {active} from step {step + 1} on.")

    def _train(self, active: Container[int]) -> None:
        """Let these layers train, and no others."""
        for index, layer in self.layers.items():
            for parameter in layer:
                parameter.requires_grad_(index in active)


def lisa_callback_factory(trainer: Trainer) -> Callable[..., LISACallback]:
    """The callback of a trainer, to be called with its other arguments."""
    return partial(LISACallback, trainer)


def find_layers(model: Any, path: str) -> nn.ModuleList:
    """The decoder layers at an attribute path of the model, under an adapter if it has one.

    Raises:
        ConfigError: there is no list of layers.
    """
    plain = plain_model(model)
    try:
        layers = operator.attrgetter(path)(plain)
    except AttributeError as error:
        raise ConfigError(f"`lisa_layers_attribute: {path}`: the model has no such part ({error}).") from error
    if not isinstance(layers, nn.ModuleList):
        lists = [name for name, module in plain.named_modules() if isinstance(module, nn.ModuleList)]
        raise ConfigError(
            f"`lisa_layers_attribute: {path}` is no list of layers but a {type(layers).__name__}. Write one of {', '.join(lists[:6])}."
        )
    return layers
