"""A trainer class of somebody else, with `AxolotlTrainer` under it.

What a config says of packing, streams, optimizer groups, schedules, the loss and checkpoints is done by the mixins of
`AxolotlTrainer`. A class that inherits from `transformers.Trainer` alone would leave all of it out without a word.
"""

from __future__ import annotations

import types
from typing import Any

from transformers import Trainer

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.trainers.mixins.packing import PackingMixin
from axolotl.exceptions import ConfigError


def adopt_trainer_cls(trainer_cls: type[Trainer]) -> type[AxolotlTrainer]:
    """The class with `AxolotlTrainer` in the place that `Trainer` has among its bases.

    What the class overrides wins, and its `super()` calls reach ours: it is as if it had been written so.

    Args:
        trainer_cls: a subclass of `Trainer`, or `Trainer` itself.

    Raises:
        ConfigError: Python cannot combine the two classes.
    """
    if issubclass(trainer_cls, AxolotlTrainer):
        return trainer_cls
    if issubclass(AxolotlTrainer, trainer_cls):
        return AxolotlTrainer
    same = {name: getattr(trainer_cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    try:
        return types.new_class(
            trainer_cls.__name__, (trainer_cls, AxolotlTrainer), exec_body=lambda ns: ns.update(same)
        )
    except TypeError as error:
        raise ConfigError(
            f"the trainer class `{path_of(trainer_cls)}` cannot be combined with ours, which serves the keys of the config: "
            f"{' '.join(str(error).split())}. Let it inherit from `axolotl.core.trainers.base.AxolotlTrainer`."
        ) from error


def check_is_set_up(trainer: Any) -> None:
    """Raise `ConfigError` where the constructor of a trainer class passed that of `AxolotlTrainer` by."""
    if isinstance(trainer, AxolotlTrainer) and not trainer.is_set_up:
        cls = type(trainer)
        raise ConfigError(
            f"`{path_of(cls)}.__init__` sets up `Trainer` only, so that packing and other keys of the config would do nothing. Let it "
            "call `super().__init__(...)` instead of `Trainer.__init__(self, ...)`."
        )


def own_batches(trainer_cls: type[Trainer], method: str) -> bool:
    """Whether a class makes its batches itself: it overrides `get_train_dataloader` or `get_eval_dataloader`."""
    return getattr(trainer_cls, method) not in (getattr(Trainer, method), getattr(PackingMixin, method))


def path_of(cls: type) -> str:
    """Where a class is found, as a config names it."""
    return f"{cls.__module__}.{cls.__qualname__}"
