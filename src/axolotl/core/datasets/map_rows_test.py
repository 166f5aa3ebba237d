"""Rows through a function, in one process and in several."""

from __future__ import annotations

import os
import signal

import pyarrow as pa
import pytest
from datasets import Dataset

from axolotl.core.datasets.map_rows import BLOCK_ROWS, can_fork, map_rows, to_table
from axolotl.exceptions import DatasetError

ROWS = Dataset.from_dict({"number": list(range(2 * BLOCK_ROWS + 300))})
needs_fork = pytest.mark.skipif(not can_fork(), reason="processes cannot be forked on this system")


def count_up(rows: dict[str, list], numbers: list[int]) -> dict[str, list]:
    """As many tokens as the last digit of the row's number, and no row for multiples of seven."""
    kept = [number for number in rows["number"] if number % 7]
    ids = [list(range(number % 10)) for number in kept]
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "number": kept}


@pytest.mark.parametrize(("num_proc", "keep_in_memory"), [(1, False), (3, False), (1, True)])
def test_rows_keep_their_order(num_proc, keep_in_memory):
    mapped = map_rows(ROWS, count_up, num_proc=num_proc, keep_in_memory=keep_in_memory)
    assert mapped[:] == count_up(ROWS[:], list(range(len(ROWS))))
    assert bool(mapped.cache_files) is not keep_in_memory
    assert mapped.data.schema.field("input_ids").type == pa.list_(pa.int32())
    assert mapped.data.schema.field("attention_mask").type == pa.list_(pa.int8())


@needs_fork
def test_parts_of_the_rows_may_hold_narrower_values_than_others():
    def score(rows, numbers):
        return {"score": [0.5 if number < BLOCK_ROWS else 1 for number in numbers], "note": [None] * len(numbers)}

    mapped = map_rows(ROWS, score, num_proc=2)
    assert mapped["score"][:] == [0.5] * BLOCK_ROWS + [1.0] * (BLOCK_ROWS + 300)


@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_nothing_left_is_an_empty_dataset_of_tokens(keep_in_memory):
    mapped = map_rows(ROWS, lambda rows, numbers: {}, keep_in_memory=keep_in_memory)
    assert len(mapped) == 0 and set(mapped.column_names) == {"input_ids", "labels", "attention_mask"}


def test_only_whole_numbers_become_tokens():
    values = {
        "labels": [[1, 0.5], []],
        "input_ids": [[0, 2**31 - 1], [7]],
        "attention_mask": [[1, 0], [0]],
        "other": ["a", None],
    }
    table = to_table(values)
    assert table.to_pydict() == values
    assert pa.types.is_floating(table.schema.field("labels").type.value_type)


@needs_fork
def test_the_error_of_a_process_is_raised_here():
    def refuse(rows, numbers):
        if 2000 in numbers:
            raise DatasetError("Row 2000 is odd")
        return count_up(rows, numbers)

    with pytest.raises(DatasetError, match="Row 2000 is odd"):
        map_rows(ROWS, refuse, num_proc=3)


@needs_fork
def test_a_killed_process_does_not_hang():
    def killed(rows, numbers):
        if 2000 in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        return count_up(rows, numbers)

    with pytest.raises(DatasetError, match=r"exit code -9.*`dataset_num_proc`"):
        map_rows(ROWS, killed, num_proc=3)
