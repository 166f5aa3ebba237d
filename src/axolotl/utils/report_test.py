"""The report as a page: whole, self-contained, right figures."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from axolotl.utils.report import build_report, nice_ticks, read_points, running_mean


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def history(steps: int) -> list[dict]:
    entries = [
        {"step": s, "loss": 3 / s, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens/per_sec_per_gpu": 5e3}
        for s in range(1, steps + 1)
    ]
    return [*entries, {"step": steps, "eval_loss": 0.5}]


@pytest.mark.parametrize("steps", [1, 5, 200])
def test_the_page_is_whole_and_needs_nothing_else(steps):
    page = build_report("a <run>", history(steps), {"steps": steps}, "key: <value> & more")
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r"<script|https?://|src=|@import|url\(", page)
    assert "a &lt;run&gt;" in page
    assert "&lt;value&gt; &amp; more" in page
    assert page.count("<svg") == 4  # no card for what was not measured
    assert "nan" not in page.lower().replace("tenant", "")


def test_an_empty_history_still_makes_a_page():
    assert "<svg" not in build_report("t", [], {}, "")


def test_values_that_are_not_finite_are_left_out():
    assert read_points([{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0}], "loss") == [(2.0, 1.0)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 0.04), (1e-6, 2e-6), (5, 5), (0, 0), (1e9, 3e9)])
def test_ticks_enclose_the_values(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12 * abs(low)
    assert ticks[-1] >= high - 1e-12 * abs(high)
    assert 2 <= len(ticks) <= 8


def test_a_running_mean_keeps_ends_and_straight_lines():
    line = [(float(i), 2.0 * i) for i in range(100)]
    assert [y for _, y in running_mean(line)] == pytest.approx([y for _, y in line])
