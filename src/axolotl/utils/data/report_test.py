"""The numbers of a prepared dataset."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from axolotl.utils.data.report import NUM_BARS, bars, histogram


@pytest.mark.parametrize(
    ("lengths", "labels"),
    [([], []), ([48, 48], ["48"]), ([4, 6, 6], ["4", "5", "6"]), ([2, 1050], ["2 to 45", "1,014 to 1,057"])],
)
def test_labels_of_bars(lengths, labels):
    shown = [label for label, _, _ in bars({"histogram": histogram(np.array(lengths, dtype=np.int64))})]
    assert [*shown[:1], *shown[-1:]] == [*labels[:1], *labels[-1:]]
    assert len(shown) <= NUM_BARS and len(set(shown)) == len(shown)


@given(st.lists(st.integers(1, 5_000), min_size=1))
def test_every_length_is_counted_once(lengths):
    found = histogram(np.array(lengths))
    expected = [sum(a <= length < b for length in lengths) for a, b in itertools.pairwise(found["borders"])]
    assert found["counts"] == expected and sum(expected) == len(lengths)
