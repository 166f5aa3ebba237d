"""The fast paths lose what plain PyTorch loses, step by step."""

from __future__ import annotations

import json

import pytest

from tests.numerics.workloads import NUM_STEPS, RECORD, WORKLOADS, fast_curve, largest_difference, plain_curve


@pytest.mark.parametrize("name", WORKLOADS)
def test_losses_are_those_of_plain_pytorch(name: str) -> None:
    workload = WORKLOADS[name]
    if workload.adapter == "qlora":
        pytest.importorskip("bitsandbytes")
    plain, fast = plain_curve(workload.adapter), fast_curve(name)
    assert len(plain) == NUM_STEPS and plain[-1] < 0.95 * plain[0]
    assert largest_difference(fast, plain) <= workload.tolerance


def test_the_record_is_of_these_workloads() -> None:
    recorded = json.loads(RECORD.read_text())
    assert {name: row["tolerance"] for name, row in recorded.items()} == {
        name: workload.tolerance for name, workload in WORKLOADS.items()
    }
    for name, row in recorded.items():
        assert len(row["plain"]) == len(row["fast"]) == NUM_STEPS
        assert largest_difference(row["fast"], row["plain"]) <= row["tolerance"], name
