"""The recorded runs give the recorded losses."""

from __future__ import annotations

import json

import pytest

from tests.numerics.runs import NUM_STEPS, RECORD, RUNS, losses_of


@pytest.mark.parametrize("name", list(RUNS))
def test_losses_are_the_recorded_ones(name: str, tmp_path) -> None:
    recorded = json.loads(RECORD.read_text())
    assert sorted(recorded) == sorted(RUNS) and len(recorded[name]) == NUM_STEPS
    # Kernels of other CPUs and versions add in another order; 20 steps make 1e-7 of that to less than 1e-4.
    assert losses_of(name, tmp_path) == pytest.approx(recorded[name], rel=1e-4)
