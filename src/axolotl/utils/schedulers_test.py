"""Every schedule at steps where its formula gives a number that can be worked out by hand, and across a save."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

from axolotl.exceptions import ConfigError
from axolotl.utils.schedulers import (
    InterpolatingLogScheduler,
    JaggedLRRestartScheduler,
    RexLR,
    Schedule,
    build_scheduler,
    get_cosine_schedule_with_min_lr,
    get_cosine_schedule_with_quadratic_warmup,
    get_cosine_schedule_with_warmup_decay_constant,
    learning_rates,
)
from axolotl.utils.schemas.enums import SCHEDULERS

LR, STEPS, WARMUP = 0.01, 110, 10
# A quarter, half and three quarters of the decay, where the cosine is cos(pi / 4), 0 and -cos(pi / 4).
QUARTER, MIDDLE, THREE_QUARTERS = 35, 60, 85
ROOT = math.sqrt(0.5)
LINEAR_WARMUP = {0: 0.0, 5: 0.5, 10: 1.0}


def half_wave(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


# name -> (further keys, step -> share of the peak)
CURVES: dict[str, tuple[dict, dict[int, float]]] = {
    "constant": ({}, {0: 1, 5: 1, 100: 1}),
    "constant_with_warmup": ({}, {**LINEAR_WARMUP, 100: 1}),
    "linear": ({}, {**LINEAR_WARMUP, QUARTER: 0.75, MIDDLE: 0.5, 109: 0.01}),
    "cosine": ({}, {**LINEAR_WARMUP, QUARTER: (1 + ROOT) / 2, MIDDLE: 0.5, THREE_QUARTERS: (1 - ROOT) / 2}),
    "cosine in waves": ({"kwargs": {"num_cycles": 1.5}}, {QUARTER: (1 - ROOT) / 2, MIDDLE: 0.5, 109: half_wave(2.97)}),
    "cosine_with_restarts": (
        {"kwargs": {"num_cycles": 2}},
        {**LINEAR_WARMUP, QUARTER: 0.5, 59: half_wave(0.98), MIDDLE: 1, THREE_QUARTERS: 0.5},
    ),
    "polynomial": (
        {"kwargs": {"power": 2.0, "lr_end": 0.0}},
        {**LINEAR_WARMUP, QUARTER: 0.5625, MIDDLE: 0.25, THREE_QUARTERS: 0.0625},
    ),
    "inverse_sqrt": ({"kwargs": {"timescale": 10}}, {**LINEAR_WARMUP, 40: 0.5, 90: 1 / 3}),
    "cosine_with_min_lr": ({"kwargs": {"min_lr": LR / 5}}, {**LINEAR_WARMUP, MIDDLE: 0.6}),
    # transformers counts the steps of this one from 1, and reaches the peak one step before the decay begins.
    "cosine_warmup_with_min_lr": (
        {"kwargs": {"min_lr_rate": 0.2, "warmup_lr_rate": 0.5}},
        {0: 0.5, 3: 0.5 + 0.5 * 3 / 9, 9: 1, MIDDLE - 1: 0.6, 109: 0.2},
    ),
    "warmup_stable_decay": (
        {"kwargs": {"num_decay_steps": 20, "decay_type": "linear", "min_lr_ratio": 0.1}},
        {0: 0.1, 5: 0.55, 10: 1, 50: 1, 89: 1, 100: 0.55, 109: 0.1 + 0.9 / 20},
    ),
    # torch counts the last step of the rise as the peak: it is step pct_start * steps - 1.
    "one_cycle": (
        {"div_factor": 20.0, "kwargs": {"pct_start": 0.1, "final_div_factor": 50.0}},
        {0: 0.05, 5: (0.05 + 1) / 2, 10: 1, 109: 0.05 / 50},
    ),
    "rex": ({}, {**LINEAR_WARMUP, QUARTER: 0.75 / 0.775, MIDDLE: 0.5 / 0.55, THREE_QUARTERS: 0.25 / 0.325}),
    "rex to a minimum": ({"min_lr_ratio": 0.2}, {10: 1, MIDDLE: 0.2 + 0.8 * 0.5 / 0.55, 109: 0.2 + 0.8 * 0.01 / 0.109}),
    "cosine to a minimum": (
        {"min_lr_ratio": 0.2},
        {**LINEAR_WARMUP, QUARTER: 0.2 + 0.4 * (1 + ROOT), MIDDLE: 0.6, 109: 0.2 + 0.8 * half_wave(0.99)},
    ),
    # The decay takes 45 steps, from 10 to half of 110: a third of it is 0.75 of the wave, two thirds are 0.25.
    "cosine then constant": (
        {"min_lr_ratio": 0.2, "constant_lr_ratio": 0.5},
        {**LINEAR_WARMUP, 25: 0.2 + 0.8 * 0.75, 40: 0.2 + 0.8 * 0.25, 55: 0.2, 80: 0.2, 109: 0.2},
    ),
    "cosine with quadratic warmup": ({"quadratic_warmup": True}, {0: 0, 1: 0.01, 5: 0.25, 10: 1, MIDDLE: 0.5}),
    "cosine with quadratic warmup to a minimum": (
        {"quadratic_warmup": True, "min_lr_ratio": 0.2},
        {1: 0.01, 5: 0.25, 10: 1, MIDDLE: 0.6},
    ),
    "constant restarted": (
        {"restart_steps": 25, "restart_warmup_steps": 10, "restart_anneal_steps": 5, "min_lr_ratio": 0.1},
        {0: 1, 20: 1, 21: 0.82, 24: 0.28, 25: 0.1, 30: 0.55, 34: 0.91, 35: 1, 45: 1, 49: 0.28, 50: 0.1, 100: 0.1},
    ),
    "constant restarted as it comes": ({"restart_steps": 50}, {49: 1, 50: 0.001, 55: 0.5005, 60: 1, 100: 0.001}),
    "linear restarted": (
        {"restart_steps": 55, "restart_warmup_steps": 10, "restart_anneal_steps": 5},
        {5: 0.5, QUARTER: 0.75, 55: 0.55 * 0.001, MIDDLE: 0.5 * 0.5005, THREE_QUARTERS: 0.25},
    ),
}


def optimizer(*rates: float) -> SGD:
    return SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates or (LR,)])


def rates_of(scheduler, opt, steps: int) -> list[float]:
    rates = [opt.param_groups[0]["lr"]]
    for _ in range(steps):
        opt.step()
        scheduler.step()
        rates.append(opt.param_groups[0]["lr"])
    return rates


def schedule_of(title: str) -> Schedule:
    return Schedule(name=title.split()[0], learning_rate=LR, **CURVES[title][0])


@pytest.mark.parametrize("title", CURVES)
def test_curves(title):
    rates = learning_rates(schedule_of(title), WARMUP, STEPS)
    assert len(rates) == STEPS
    for step, share in CURVES[title][1].items():
        assert rates[step] == pytest.approx(share * LR, rel=1e-9, abs=1e-14), step


def test_every_schedule_has_its_curve():
    by_metric = {"reduce_lr_on_plateau", "greedy"}
    assert {title.split()[0] for title in CURVES} | by_metric == SCHEDULERS
    assert all(learning_rates(Schedule(name, LR), WARMUP, STEPS) == [] for name in by_metric)


@pytest.mark.parametrize("title", CURVES)
def test_each_group_keeps_its_share(title):
    opt = optimizer(LR, LR / 10)
    scheduler = build_scheduler(schedule_of(title), opt, WARMUP, STEPS)
    for _ in range(30):
        if title not in ("polynomial", "cosine_with_min_lr"):  # whose last rate is one number for all groups
            assert opt.param_groups[1]["lr"] == pytest.approx(opt.param_groups[0]["lr"] / 10)
        opt.step()
        scheduler.step()


@pytest.mark.parametrize("title", CURVES)
@pytest.mark.parametrize("step", [3, 27])
def test_a_schedule_goes_on_after_a_save(title, step, tmp_path):
    opt = optimizer(LR, LR / 10)
    scheduler = build_scheduler(schedule_of(title), opt, WARMUP, STEPS)
    rates_of(scheduler, opt, step)
    torch.save([opt.state_dict(), scheduler.state_dict()], tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed_opt = optimizer(LR, LR / 10)
    resumed = build_scheduler(schedule_of(title), resumed_opt, WARMUP, STEPS)
    resumed_opt.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert rates_of(resumed, resumed_opt, 30) == rates_of(scheduler, opt, 30)
    assert resumed_opt.param_groups[1]["lr"] == opt.param_groups[1]["lr"]


@pytest.mark.parametrize("title", CURVES)
def test_a_run_that_goes_on_for_longer_has_the_curve_of_the_longer_one(title):
    opt = optimizer()
    scheduler = build_scheduler(schedule_of(title), opt, WARMUP, STEPS)
    rates_of(scheduler, opt, STEPS - 1)
    longer_opt = optimizer()
    longer = build_scheduler(schedule_of(title), longer_opt, WARMUP, 2 * STEPS)
    longer_opt.load_state_dict(opt.state_dict())
    longer.load_state_dict(scheduler.state_dict())
    whole_opt = optimizer()
    whole = rates_of(build_scheduler(schedule_of(title), whole_opt, WARMUP, 2 * STEPS), whole_opt, STEPS + 29)
    assert rates_of(longer, longer_opt, 30)[1:] == pytest.approx(whole[STEPS:])


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("cosine", {"num_cycle": 2}, "Did you mean `num_cycles`"),
        ("linear", {"power": 2}, "It has none"),
        ("rex", {"min_lr": 0}, "no option of `lr_scheduler: rex`"),
        ("one_cycle", {"max_lr": 1}, "no option of `lr_scheduler: one_cycle`"),
        ("warmup_stable_decay", {}, "needs `lr_scheduler_kwargs` with `num_decay_steps`"),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "straight"}, "straight"),
        ("cosine_with_min_lr", {}, "cannot be set up"),
        ("reduce_lr_on_plateau", {"patient": 3}, "Did you mean `patience`"),
    ],
)
def test_arguments_that_a_schedule_does_not_have_are_named(name, kwargs, said):
    with pytest.raises(ConfigError, match=said):
        build_scheduler(Schedule(name, LR, kwargs), optimizer(), WARMUP, STEPS)


def test_documented_functions():
    for make, middle, last in (
        (lambda opt: get_cosine_schedule_with_min_lr(opt, WARMUP, STEPS, 0.2), 0.6, 0.2),
        (lambda opt: get_cosine_schedule_with_quadratic_warmup(opt, WARMUP, STEPS), 0.5, 0.0),
        (lambda opt: get_cosine_schedule_with_warmup_decay_constant(opt, WARMUP, STEPS, 1.0, 0.1), 0.55, 0.1),
    ):
        opt = optimizer()
        rates = rates_of(make(opt), opt, STEPS)
        assert (rates[MIDDLE] / LR, rates[STEPS] / LR) == pytest.approx((middle, last))


def test_rex():
    opt = optimizer(LR, LR / 10)
    rates = rates_of(RexLR(opt, max_lr=LR, min_lr=0.0, total_steps=STEPS, num_warmup_steps=WARMUP), opt, STEPS)
    assert (rates[0], rates[MIDDLE], rates[STEPS]) == (0, pytest.approx(LR * 0.5 / 0.55), 0)
    with pytest.raises(ValueError, match="min_lr"):
        RexLR(optimizer(), max_lr=1e-3, min_lr=1e-2, total_steps=10)
    with pytest.raises(ValueError, match="num_warmup_steps"):
        RexLR(optimizer(), max_lr=1e-3, min_lr=0, total_steps=10, num_warmup_steps=11)


def test_interpolating_log():
    opt = optimizer()
    rates = rates_of(InterpolatingLogScheduler(opt, 5, 1e-5, 1e-1), opt, 6)
    assert [round(math.log10(rate), 6) for rate in rates] == [-5, -4, -3, -2, -1, -1, -1]


def test_a_restart_wraps_a_schedule_that_multiplies_the_rate_it_finds():
    opt = optimizer()
    rates = rates_of(JaggedLRRestartScheduler(opt, ExponentialLR(opt, 0.5), 4, 2, 2, min_lr_scale=0.1), opt, 8)
    scales = [1, 1, 1, 0.55, 0.1, 0.55, 1, 0.55, 0.1]
    assert rates == pytest.approx([LR * 0.5**step * scale for step, scale in enumerate(scales)])


def test_a_restart_without_rise():
    opt = optimizer()
    rates = rates_of(JaggedLRRestartScheduler(opt, LambdaLR(opt, lambda step: 1.0), 4, 0, 0), opt, 9)
    assert rates == [LR] * 10
