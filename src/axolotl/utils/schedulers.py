"""Learning rate schedules beyond those of transformers.

Each is a torch `LRScheduler` whose state is its step counter, so that it resumes from a checkpoint. Functions return a
`LambdaLR`, whose factors apply to the learning rate of every param group.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


class RexLR(LRScheduler):
    """Reflected exponential schedule (Chen et al., https://arxiv.org/abs/2107.04197).

    Linear warmup from 0, then `min_lr + (max_lr - min_lr) * z / (0.1 + 0.9 * z)` with z the share of steps left.

    Args:
        optimizer: the optimizer. Groups whose `lr` differs from `max_lr` keep their ratio to it.
        max_lr: peak learning rate.
        min_lr: last learning rate, of a group with `lr == max_lr`.
        total_steps: steps of the run, warmup included.
        num_warmup_steps: steps of the warmup.
        last_step: steps already taken.

    Raises:
        ValueError: `min_lr > max_lr`, or `num_warmup_steps > total_steps`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float,
        min_lr: float,
        total_steps: int = 0,
        num_warmup_steps: int = 0,
        last_step: int = 0,
    ):
        if min_lr > max_lr:
            raise ValueError(f"Value of `min_lr` should be less than value of `max_lr`. Got {min_lr=} and {max_lr=}")
        if num_warmup_steps > total_steps:
            raise ValueError(f"`num_warmup_steps` ({num_warmup_steps}) must not exceed `total_steps` ({total_steps})")
        self.max_lr = max_lr
        self.min_lr = min_lr
        self.total_steps = total_steps
        self.num_warmup_steps = num_warmup_steps
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        super().__init__(optimizer, last_step - 1)

    def get_lr(self) -> list[float | Tensor]:
        step = max(self.last_epoch, 0)
        if step < self.num_warmup_steps:
            lr = self.max_lr * step / self.num_warmup_steps
        else:
            decay_steps = max(self.total_steps - self.num_warmup_steps, 1)
            left = max(1.0 - (step - self.num_warmup_steps) / decay_steps, 0.0)
            lr = self.min_lr + (self.max_lr - self.min_lr) * left / (0.1 + 0.9 * left)
        return [base * (lr / self.max_lr) if self.max_lr else 0.0 for base in self.base_lrs]


class InterpolatingLogScheduler(LRScheduler):
    """Learning rates that are equally spaced on a logarithmic scale (a learning rate range test).

    Args:
        optimizer: the optimizer.
        num_steps: step at which `max_lr` is reached; it stays there.
        min_lr: first learning rate, above 0.
        max_lr: last learning rate.
        last_epoch: index of the last step, -1 for a new run.
    """

    def __init__(self, optimizer: Optimizer, num_steps: int, min_lr: float, max_lr: float, last_epoch: int = -1):
        self.num_steps = num_steps
        self.min_lr = min_lr
        self.max_lr = max_lr
        self.q = (max_lr / min_lr) ** (1 / max(num_steps - 1, 1))
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        if self.last_epoch < self.num_steps - 1:
            lr = self.min_lr * self.q ** max(self.last_epoch, 0)
        else:
            lr = self.max_lr
        return [lr for _ in self.base_lrs]


class JaggedLRRestartScheduler(LRScheduler):
    """Wraps a schedule and lets the learning rate fall and rise again around each restart (ReLoRA, arXiv 2307.05695).

    Within `jagged_restart_anneal_steps` before a restart the rate falls to `min_lr_scale` of the wrapped schedule, within
    `jagged_restart_warmup_steps` after it the rate rises back. The first warmup is that of the wrapped schedule.

    Args:
        optimizer: the optimizer.
        inner_schedule: schedule whose rates are scaled. It is stepped from here.
        jagged_restart_steps: steps between restarts.
        jagged_restart_warmup_steps: steps of the rise.
        jagged_restart_anneal_steps: steps of the fall.
        min_lr_scale: lowest factor.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        inner_schedule: LRScheduler,
        jagged_restart_steps: int,
        jagged_restart_warmup_steps: int,
        jagged_restart_anneal_steps: int = 1,
        min_lr_scale: float = 0.001,
    ):
        self.inner_schedule = inner_schedule
        self.restarts_steps = jagged_restart_steps
        self.warmup_steps = jagged_restart_warmup_steps
        self.anneal_steps = jagged_restart_anneal_steps
        self.min_lr_scale = min_lr_scale
        # The first step of the base class counts up by one.
        super().__init__(optimizer, inner_schedule.last_epoch - 1)

    def get_lr(self) -> list[float | Tensor]:
        step = self.last_epoch
        self.inner_schedule.last_epoch = step
        with warnings.catch_warnings():
            # It is not stepped: its rate at this step is wanted, not a change of the optimizer.
            warnings.filterwarnings("ignore", message="To get the last learning rate computed")
            rates = self.inner_schedule.get_lr()
        since, left = step % self.restarts_steps, self.restarts_steps - step % self.restarts_steps
        if step < self.restarts_steps - self.anneal_steps:
            scale = 1.0
        elif since < self.warmup_steps and step >= self.restarts_steps:
            scale = self.min_lr_scale + (1 - self.min_lr_scale) * since / max(self.warmup_steps, 1)
        elif left <= self.anneal_steps:
            scale = self.min_lr_scale + (1 - self.min_lr_scale) * (left - 1) / max(self.anneal_steps, 1)
        else:
            scale = 1.0
        return [rate * scale for rate in rates]

    def state_dict(self) -> dict:
        own = {key: value for key, value in self.__dict__.items() if key not in ("optimizer", "inner_schedule")}
        return {**own, "inner_schedule": self.inner_schedule.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        state_dict = dict(state_dict)
        self.inner_schedule.load_state_dict(state_dict.pop("inner_schedule"))
        self.__dict__.update(state_dict)


def _cosine(progress: float, num_cycles: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress)))


def _warmup_then(
    step: int, *, num_warmup_steps: int, num_training_steps: int, warmup_power: int, decay: Callable[[float], float]
) -> float:
    """Factor of the learning rate at a step: a power of the warmup's progress, then `decay` of the remaining progress."""
    if step < num_warmup_steps:
        return (step / max(1, num_warmup_steps)) ** warmup_power
    return decay((step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps))


def get_cosine_schedule_with_quadratic_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> LambdaLR:
    """Cosine to 0 after a warmup that rises with the square of the step.

    Args:
        optimizer: the optimizer.
        num_warmup_steps: steps of the warmup.
        num_training_steps: steps of the run.
        num_cycles: waves of the cosine; 0.5 falls once from the peak to 0.
        last_epoch: index of the last step when resuming.
    """
    factor = partial(
        _warmup_then,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        warmup_power=2,
        decay=partial(_cosine, num_cycles=num_cycles),
    )
    return LambdaLR(optimizer, factor, last_epoch)


def _cosine_to(progress: float, min_lr_ratio: float, num_cycles: float) -> float:
    return min_lr_ratio + (1.0 - min_lr_ratio) * _cosine(progress, num_cycles)


def get_cosine_schedule_with_min_lr(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, min_lr_ratio: float = 0.0
) -> LambdaLR:
    """Linear warmup, then cosine from the peak to `min_lr_ratio` of it.

    Args:
        optimizer: the optimizer.
        num_warmup_steps: steps of the warmup.
        num_training_steps: steps of the run.
        min_lr_ratio: last learning rate over the peak.
    """
    factor = partial(
        _warmup_then,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        warmup_power=1,
        decay=partial(_cosine_to, min_lr_ratio=min_lr_ratio, num_cycles=0.5),
    )
    return LambdaLR(optimizer, factor)


def get_cosine_schedule_with_warmup_decay_constant(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    constant_lr_ratio: float,
    min_lr_ratio: float,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> LambdaLR:
    """Cosine to `min_lr_ratio` by step `num_training_steps * constant_lr_ratio`, then constant (arXiv 2308.04014).

    Args:
        optimizer: the optimizer.
        num_warmup_steps: steps of the linear warmup.
        num_training_steps: steps of the run.
        constant_lr_ratio: share of the run after which the rate stays.
        min_lr_ratio: rate at which it stays, over the peak.
        num_cycles: waves of the cosine.
        last_epoch: index of the last step when resuming.
    """
    decay_end = int(num_training_steps * constant_lr_ratio)

    def decay(progress: float) -> float:
        return _cosine_to(min(progress, 1.0), min_lr_ratio, num_cycles)

    factor = partial(
        _warmup_then, num_warmup_steps=num_warmup_steps, num_training_steps=decay_end, warmup_power=1, decay=decay
    )
    return LambdaLR(optimizer, factor, last_epoch)
