"""Learning rate schedules beyond those of transformers.

Each is a torch `LRScheduler` whose state is its step counter, so that it resumes from a checkpoint. Functions return a
`LambdaLR`, whose factors apply to the learning rate of every param group. `build_scheduler` turns the keys of a config into
one of them or of those of transformers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR, get_scheduler

from axolotl.exceptions import ConfigError, did_you_mean

# Rates of these follow the evaluations: nothing can be said about them in advance, and nothing can wrap them.
BY_METRIC: dict[str, type] = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}
# Arguments of schedules that the run gives, or that say the same as those.
NOT_OPTIONS = (
    "self",
    "optimizer",
    "num_warmup_steps",
    "num_training_steps",
    "last_epoch",
    "max_lr",
    "total_steps",
    "epochs",
    "steps_per_epoch",
    "verbose",
)

# What a checkpoint says about a schedule: where it stands. `_last_lr` is what was logged.
POSITION = ("base_lrs", "last_epoch", "_step_count", "_is_initial", "_get_lr_called_within_step", "_last_lr")


class ResumedLR(LRScheduler):
    """A resumed run takes its position from the checkpoint, but its curve from its own config, as with `LambdaLR`.

    A run that goes on for more steps than the one before would stay at the end of the old curve.
    """

    def load_state_dict(self, state_dict: dict) -> None:
        self.__dict__.update({key: state_dict[key] for key in POSITION if key in state_dict})


class ResumedOneCycleLR(ResumedLR, OneCycleLR):
    """torch's `OneCycleLR` over the steps of this run."""


class RexLR(ResumedLR):
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


class InterpolatingLogScheduler(ResumedLR):
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


class JaggedLRRestartScheduler(ResumedLR):
    """Wraps a schedule and lets the learning rate fall and rise again around each restart (ReLoRA, arXiv 2307.05695).

    The factor of the wrapped schedule's rate is linear between these points, and 1 elsewhere: 1 at
    `jagged_restart_anneal_steps` before a restart, `min_lr_scale` at the restart, 1 again `jagged_restart_warmup_steps`
    after it. Where rise and fall overlap, the rise counts. The first warmup is that of the wrapped schedule.

    Args:
        optimizer: the optimizer.
        inner_schedule: schedule whose rates are scaled. It is stepped from here, and sees its own rates.
        jagged_restart_steps: steps between restarts.
        jagged_restart_warmup_steps: steps of the rise.
        jagged_restart_anneal_steps: steps of the fall.
        min_lr_scale: lowest factor.

    Raises:
        ValueError: `jagged_restart_steps` is below 1.
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
        if jagged_restart_steps < 1:
            raise ValueError(f"{jagged_restart_steps=} must be at least 1")
        self.inner_schedule = inner_schedule
        self.restarts_steps = jagged_restart_steps
        self.warmup_steps = jagged_restart_warmup_steps
        self.anneal_steps = jagged_restart_anneal_steps
        self.min_lr_scale = min_lr_scale
        # The first step of the base class counts up by one.
        super().__init__(optimizer, inner_schedule.last_epoch - 1)

    def get_lr(self) -> list[float | Tensor]:
        while self.inner_schedule.last_epoch < self.last_epoch:
            self._step_inner()
        scale = self._scale(self.last_epoch)
        return [rate * scale for rate in self.inner_schedule.get_last_lr()]

    def _step_inner(self) -> None:
        """Step the wrapped schedule from its own rates: some schedules multiply the rate that they find."""
        for group, rate in zip(self.optimizer.param_groups, self.inner_schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self.inner_schedule.step()

    def _scale(self, step: int) -> float:
        since = step % self.restarts_steps
        left = self.restarts_steps - since
        if step >= self.restarts_steps and since < self.warmup_steps:
            share = since / self.warmup_steps
        elif left < self.anneal_steps:
            share = left / self.anneal_steps
        else:
            share = 1.0
        return self.min_lr_scale + (1 - self.min_lr_scale) * share

    def state_dict(self) -> dict:
        own = {key: value for key, value in self.__dict__.items() if key not in ("optimizer", "inner_schedule")}
        return {**own, "inner_schedule": self.inner_schedule.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.inner_schedule.load_state_dict(state_dict["inner_schedule"])
        super().load_state_dict(state_dict)


def _cosine_factor(
    step: int, *, num_warmup_steps: int, end: int, warmup_power: int, min_lr_ratio: float, num_cycles: float
) -> float:
    """Factor of the learning rate: a power of the warmup's progress, a cosine until step `end`, then its last value."""
    if step < num_warmup_steps:
        return (step / max(1, num_warmup_steps)) ** warmup_power
    progress = (step - num_warmup_steps) / max(1, end - num_warmup_steps)
    wave = max(0.0, 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * min(progress, 1.0))))
    return min_lr_ratio + (1.0 - min_lr_ratio) * wave


def _cosine_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    end: int,
    warmup_power: int = 1,
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
) -> LambdaLR:
    factor = partial(
        _cosine_factor,
        num_warmup_steps=num_warmup_steps,
        end=end,
        warmup_power=warmup_power,
        min_lr_ratio=min_lr_ratio,
        num_cycles=num_cycles,
    )
    return LambdaLR(optimizer, factor, last_epoch)


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
    return _cosine_schedule(
        optimizer, num_warmup_steps, num_training_steps, warmup_power=2, num_cycles=num_cycles, last_epoch=last_epoch
    )


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
    return _cosine_schedule(optimizer, num_warmup_steps, num_training_steps, min_lr_ratio=min_lr_ratio)


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
    return _cosine_schedule(
        optimizer,
        num_warmup_steps,
        int(num_training_steps * constant_lr_ratio),
        min_lr_ratio=min_lr_ratio,
        num_cycles=num_cycles,
        last_epoch=last_epoch,
    )


@dataclass(frozen=True)
class Schedule:
    """The keys of a config that describe the learning rate over the run.

    Args:
        name: `lr_scheduler`.
        learning_rate: the peak.
        kwargs: `lr_scheduler_kwargs`.
        quadratic_warmup: `lr_quadratic_warmup`.
        min_lr_ratio: `cosine_min_lr_ratio`.
        constant_lr_ratio: `cosine_constant_lr_ratio`.
        div_factor: `lr_div_factor`.
        restart_steps, restart_warmup_steps, restart_anneal_steps: `jagged_restart_*`.
    """

    name: str
    learning_rate: float
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    quadratic_warmup: bool = False
    min_lr_ratio: float | None = None
    constant_lr_ratio: float | None = None
    div_factor: float | None = None
    restart_steps: int | None = None
    restart_warmup_steps: int | None = None
    restart_anneal_steps: int | None = None


def build_scheduler(
    schedule: Schedule, optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int
) -> LRScheduler:
    """The learning rate schedule of a run.

    Args:
        schedule: its description.
        optimizer: whose rates it changes; their present values are the peaks.
        num_warmup_steps: steps of the warmup.
        num_training_steps: steps of the run.

    Raises:
        ConfigError: `lr_scheduler_kwargs` that the schedule does not have, lacks or refuses.
    """
    check_scheduler_kwargs(schedule)
    try:
        inner = _build_inner(schedule, optimizer, num_warmup_steps, num_training_steps)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"`lr_scheduler: {schedule.name}` cannot be set up for {num_training_steps} steps with {num_warmup_steps} of warmup "
            f"and `lr_scheduler_kwargs: {dict(schedule.kwargs)}`: {error}"
        ) from error
    if not schedule.restart_steps:
        return inner
    rise, fall = schedule.restart_warmup_steps, schedule.restart_anneal_steps
    return JaggedLRRestartScheduler(
        optimizer,
        inner,
        schedule.restart_steps,
        10 if rise is None else rise,
        1 if fall is None else fall,
        schedule.min_lr_ratio or 0.001,
    )


def _build_inner(schedule: Schedule, optimizer: Optimizer, warmup: int, steps: int) -> LRScheduler:
    kwargs = dict(schedule.kwargs)
    min_ratio = schedule.min_lr_ratio or 0.0
    if schedule.name == "one_cycle":
        # A rise of exactly one step would make torch divide by zero.
        kwargs.setdefault("pct_start", min((2 if warmup == 1 else warmup) / steps, 1.0))
        if schedule.div_factor is not None:
            kwargs.setdefault("div_factor", schedule.div_factor)
        kwargs.setdefault("cycle_momentum", {"momentum", "betas"} & set(optimizer.defaults) != set())
        rates = [group["lr"] for group in optimizer.param_groups]
        return ResumedOneCycleLR(optimizer, max_lr=rates, total_steps=steps, **kwargs)
    if schedule.name == "rex":
        return RexLR(
            optimizer,
            max_lr=schedule.learning_rate,
            min_lr=schedule.learning_rate * min_ratio,
            total_steps=steps,
            num_warmup_steps=min(warmup, steps),
        )
    if schedule.name == "cosine" and (schedule.quadratic_warmup or min_ratio):
        constant = schedule.constant_lr_ratio if min_ratio else None
        cosine_steps = steps if constant is None else int(steps * constant)
        power, cycles = (2 if schedule.quadratic_warmup else 1), kwargs.get("num_cycles", 0.5)
        return _cosine_schedule(optimizer, warmup, cosine_steps, power, min_ratio, cycles)
    return get_scheduler(schedule.name, optimizer, warmup, steps, scheduler_specific_kwargs=kwargs)


def check_scheduler_kwargs(schedule: Schedule) -> None:
    """Raise ConfigError for `lr_scheduler_kwargs` that the schedule does not have, and for those that it lacks."""
    takes = _options_of(schedule.name)
    problems = []
    for key in schedule.kwargs:
        if key not in takes:
            hint = did_you_mean(key, takes)
            options = f"It has: {', '.join(sorted(takes))}." if takes else "It has none."
            problems.append(
                f"`lr_scheduler_kwargs: {{{key}: {schedule.kwargs[key]}}}` is no option of `lr_scheduler: {schedule.name}`.{hint} {options}"
            )
    lacks = [key for key, parameter in takes.items() if parameter.default is parameter.empty]
    lacks = [key for key in lacks if key not in schedule.kwargs]
    if lacks:
        problems.append(
            f"`lr_scheduler: {schedule.name}` needs `lr_scheduler_kwargs` with {', '.join(f'`{key}`' for key in lacks)}."
        )
    if problems:
        raise ConfigError(problems)


def follow_own_curve(scheduler: Any) -> bool:
    """After a checkpoint was loaded, give the optimizer the rates that the schedule of this run has where it stands.

    The optimizer comes back with the rates of the schedule before, that of a shorter run for instance. A schedule whose rate
    follows from the rate before, or from evaluations, goes on from there.

    Returns:
        Whether the rates are others than those of the checkpoint.
    """
    is_lambda = isinstance(scheduler, LambdaLR) and type(scheduler).get_lr is LambdaLR.get_lr
    closed_form = is_lambda or isinstance(scheduler, ResumedLR)
    if not closed_form or scheduler.last_epoch < 1:
        return False
    groups = scheduler.optimizer.param_groups
    kept, before, count = [group["lr"] for group in groups], scheduler.get_last_lr(), scheduler._step_count
    # The last step is taken once more: that is how torch sets rates, and the momentum that goes with them.
    scheduler.last_epoch -= 1
    if isinstance(scheduler, JaggedLRRestartScheduler):
        scheduler.inner_schedule.last_epoch -= 1
    scheduler.step()
    scheduler._step_count = count
    if scheduler.get_last_lr() != before:
        return True
    for group, rate in zip(groups, kept, strict=True):
        group["lr"] = rate  # a callback may have set another than the schedule's
    return False


def _options_of(name: str) -> dict[str, inspect.Parameter]:
    """What `lr_scheduler_kwargs` may hold for a schedule."""
    if name == "rex":
        return {}
    if name in BY_METRIC:
        target: Callable[..., Any] = BY_METRIC[name].__init__
    elif name == "one_cycle":
        target = OneCycleLR.__init__
    else:
        target = TYPE_TO_SCHEDULER_FUNCTION[name]
    return {key: value for key, value in inspect.signature(target).parameters.items() if key not in NOT_OPTIONS}


def learning_rates(schedule: Schedule, num_warmup_steps: int, num_training_steps: int) -> list[float]:
    """The learning rate of every step of a run, for parameters at `learning_rate`. Empty when it follows evaluations."""
    if schedule.name in BY_METRIC:
        return []
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=schedule.learning_rate)
    scheduler = build_scheduler(schedule, optimizer, num_warmup_steps, num_training_steps)
    rates = []
    for _ in range(num_training_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates
