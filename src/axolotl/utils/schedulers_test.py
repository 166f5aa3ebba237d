"""Schedules at the points where their formulas are known, and across a save."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from axolotl.utils.schedulers import (
    InterpolatingLogScheduler,
    JaggedLRRestartScheduler,
    RexLR,
    get_cosine_schedule_with_min_lr,
    get_cosine_schedule_with_quadratic_warmup,
    get_cosine_schedule_with_warmup_decay_constant,
)

LR, STEPS, WARMUP = 0.01, 1000, 10


def optimizer(*rates: float) -> SGD:
    return SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates or (LR,)])


def rates_of(scheduler, opt, steps: int) -> list[float]:
    rates = [opt.param_groups[0]["lr"]]
    for _ in range(steps):
        opt.step()
        scheduler.step()
        rates.append(opt.param_groups[0]["lr"])
    return rates


def test_constant_after_the_decay():
    opt = optimizer()
    rates = rates_of(get_cosine_schedule_with_warmup_decay_constant(opt, WARMUP, STEPS, 0.8, 0.1), opt, STEPS)
    assert rates[0] == 0
    assert rates[WARMUP] == pytest.approx(LR)
    assert rates[800] == pytest.approx(0.1 * LR)
    assert rates[900] == rates[1000] == pytest.approx(0.1 * LR)


def test_cosine_to_a_minimum():
    opt = optimizer()
    rates = rates_of(get_cosine_schedule_with_min_lr(opt, WARMUP, STEPS, 0.2), opt, STEPS)
    assert rates[WARMUP // 2] == pytest.approx(LR / 2)
    assert rates[WARMUP] == pytest.approx(LR)
    assert rates[WARMUP + (STEPS - WARMUP) // 2] == pytest.approx(0.6 * LR)
    assert rates[STEPS] == pytest.approx(0.2 * LR)


def test_quadratic_warmup():
    opt = optimizer()
    rates = rates_of(get_cosine_schedule_with_quadratic_warmup(opt, WARMUP, STEPS), opt, STEPS)
    assert rates[5] == pytest.approx(LR * 0.25)
    assert rates[STEPS] == pytest.approx(0.0, abs=1e-12)


def test_rex():
    opt = optimizer(LR, LR / 10)
    scheduler = RexLR(opt, max_lr=LR, min_lr=0.0, total_steps=STEPS, num_warmup_steps=WARMUP)
    rates = rates_of(scheduler, opt, STEPS)
    assert rates[0] == 0
    assert rates[WARMUP] == pytest.approx(LR)
    assert rates[505] == pytest.approx(LR * 0.5 / (0.1 + 0.9 * 0.5))
    assert rates[STEPS] == 0
    assert opt.param_groups[1]["lr"] == 0
    with pytest.raises(ValueError, match="min_lr"):
        RexLR(optimizer(), max_lr=1e-3, min_lr=1e-2, total_steps=10)


def test_interpolating_log():
    opt = optimizer()
    rates = rates_of(InterpolatingLogScheduler(opt, 5, 1e-5, 1e-1), opt, 6)
    assert [round(math.log10(rate), 6) for rate in rates] == [-5, -4, -3, -2, -1, -1, -1]


def test_jagged_restarts():
    opt = optimizer()
    inner = LambdaLR(opt, lambda step: 1.0)
    rates = rates_of(JaggedLRRestartScheduler(opt, inner, 10, 4, 2, min_lr_scale=0.1), opt, 24)
    assert rates[7] == pytest.approx(LR)
    assert rates[8] == pytest.approx(LR * (0.1 + 0.9 * 0.5))
    assert rates[9] == rates[10] == pytest.approx(0.1 * LR)
    assert rates[12] == pytest.approx(LR * (0.1 + 0.9 * 0.5))
    assert rates[14] == pytest.approx(LR)


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: RexLR(opt, LR, 0.0, 20, 3),
        lambda opt: get_cosine_schedule_with_min_lr(opt, 3, 20, 0.1),
        lambda opt: JaggedLRRestartScheduler(opt, get_cosine_schedule_with_min_lr(opt, 3, 20, 0.1), 6, 2),
        lambda opt: InterpolatingLogScheduler(opt, 20, 1e-5, 1e-1),
    ],
)
def test_a_schedule_goes_on_after_a_save(make, tmp_path):
    opt = optimizer()
    scheduler = make(opt)
    rates_of(scheduler, opt, 7)
    torch.save([opt.state_dict(), scheduler.state_dict()], tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed_opt = optimizer()
    resumed = make(resumed_opt)
    resumed_opt.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert rates_of(resumed, resumed_opt, 8) == rates_of(scheduler, opt, 8)
