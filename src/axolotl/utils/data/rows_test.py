"""Rows by number, against `datasets`."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from axolotl.utils.data.rows import select_rows, take_rows

ROWS = Dataset.from_dict({"n": list(range(50))})


@pytest.mark.parametrize("dataset", [ROWS, ROWS.select([7, 3, 3, 40, 21]), ROWS.select(range(10, 30))])
def test_rows_are_taken_as_datasets_does(dataset):
    size = len(dataset)
    for numbers in ([], [2], [0, 1, 2], [4, 2, 2, 0], list(range(size)), list(range(size))[::-1]):
        taken = take_rows(dataset, np.array(numbers, dtype=np.int64))
        assert taken[:] == dataset.select(numbers)[:]
        assert taken.select(range(len(taken)))[:] == taken[:]
    for seed in (0, 1):
        order = np.random.default_rng(seed).permutation(size)
        assert take_rows(dataset, order)[:] == dataset.shuffle(seed=seed)[:]
    keep = np.arange(size) % 3 > 0
    assert select_rows(dataset, keep)["n"][:] == [n for n, kept in zip(dataset["n"], keep, strict=True) if kept]


def test_a_fingerprint_is_that_of_the_rows_taken():
    first, again, other = (take_rows(ROWS, np.array(numbers)) for numbers in ([5, 1], [5, 1], [1, 5]))
    assert first._fingerprint == again._fingerprint != other._fingerprint
    assert first._fingerprint != ROWS._fingerprint


def test_taken_rows_are_written_and_read(tmp_path):
    take_rows(ROWS, np.array([9, 3, 30])).save_to_disk(tmp_path / "rows")
    assert Dataset.load_from_disk(str(tmp_path / "rows"))["n"][:] == [9, 3, 30]
