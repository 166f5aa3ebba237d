"""Which rows are the first of their equals, against a set of Python tuples."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Sequence, Value, concatenate_datasets

from axolotl.utils.data.dedup import drop_duplicates, first_of_equal


def make_rows(num: int, seed: int, kind: str = "int32") -> Dataset:
    rng, rows = random.Random(seed), []
    for _ in range(num):
        ids = [rng.randrange(3) for _ in range(rng.randrange(4))]
        rows.append({"input_ids": ids, "labels": [rng.choice([-100, token]) for token in ids]})
    dataset = Dataset.from_list(rows)
    return dataset.cast_column("input_ids", Sequence(Value(kind))).cast_column("labels", Sequence(Value(kind)))


def firsts(*datasets: Dataset) -> list[bool]:
    seen: set = set()
    keys = [(tuple(row["input_ids"]), tuple(row["labels"])) for dataset in datasets for row in dataset]
    return [key not in seen and not seen.add(key) for key in keys]


@pytest.mark.parametrize("seed", range(5))
def test_the_first_of_equal_rows_stays(seed):
    dataset = make_rows(2500, seed)
    if seed % 2:
        dataset = concatenate_datasets([dataset.shuffle(seed=seed), make_rows(30, seed + 9)])
    kept, num_dropped = drop_duplicates(dataset)
    expected = [row for row, first in zip(dataset, firsts(dataset), strict=True) if first]
    assert list(kept) == expected
    assert num_dropped == len(dataset) - len(expected) > 0


def test_rows_before_count_as_seen_whatever_integers_they_are():
    before, dataset = make_rows(60, 1), make_rows(300, 2, "int64")
    kept, _ = drop_duplicates(dataset, before=before)
    flags = firsts(before, dataset)[len(before) :]
    assert list(kept) == [row for row, first in zip(dataset, flags, strict=True) if first]


def test_no_rows_and_empty_rows():
    empty = Dataset(
        pa.table(
            {"input_ids": pa.array([[], []], pa.list_(pa.int32())), "labels": pa.array([[], []], pa.list_(pa.int32()))}
        )
    )
    assert [len(part) for part in (drop_duplicates(empty)[0], drop_duplicates(empty.select([]))[0])] == [1, 0]


def test_digests_that_share_a_half_differ():
    digests = np.array([[1, 2], [1, 3], [2, 2], [1, 2], [2, 2], [0, 66]], dtype=np.uint64)
    assert first_of_equal(digests).tolist() == [True, True, True, False, False, True]
