"""The drawing of a schedule. Whole plans are made in tests/integration."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from axolotl.plan import DataPlan, Plan, draw_curve, plan_rates, print_plan
from axolotl.utils.dict import DictDefault


def test_a_curve_is_drawn_from_zero_to_its_highest_value():
    assert draw_curve([0.0, 0.5, 1.0], height=2) == ["  █", " ██"]
    assert draw_curve([1.0] * 10, width=4, height=1) == ["████"]
    assert draw_curve([0.0, 0.0]) == ["  "] * 6
    lines = draw_curve([step / 999 for step in range(1000)], width=50, height=6)
    assert [len(line) for line in lines] == [50] * 6
    heights = [sum(line[column] != " " for line in lines) for column in range(50)]
    assert heights == sorted(heights) and heights[-1] == 6


def test_the_rates_of_a_config():
    cfg = DictDefault(learning_rate="1e-3", lr_scheduler="linear", warmup_steps=2, max_steps=6)
    assert plan_rates(cfg, None) == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert len(plan_rates(DictDefault(learning_rate=1e-3), 40)) == 40
    assert plan_rates(DictDefault(learning_rate=1e-3), None) == []
    assert plan_rates(DictDefault(learning_rate=1e-3, lr_scheduler="greedy"), 40) == []


def test_a_plan_shows_the_schedule():
    plan = Plan("base", "SFT", [], [], DataPlan(), num_params=1, num_trained=1, rates=[0.0, 1e-3, 5e-4])
    out = StringIO()
    print_plan(plan, Console(file=out, width=80))
    assert "learning rate of steps 1 to 3: first 0, highest at step 2, last 0.0005" in out.getvalue()
    assert "0.001 " in out.getvalue() and "█" in out.getvalue()
