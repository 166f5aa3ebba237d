"""Exact deduplication of tokenized rows.

A row is known by its digest, 16 bytes, and equal ones are found by sorting a part of the digests at a time, so a row costs less
than 20 bytes of memory. A set of Python objects would take a hundred.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset

from axolotl.utils.data.rows import select_rows

ROWS_PER_READ = 1000

NUM_PARTS = 64
"""Parts that digests are sorted in, by their last bits. Only one of them is copied at a time."""


def drop_duplicates(dataset: Dataset, before: Dataset | None = None) -> tuple[Dataset, int]:
    """Keep the first of rows with equal tokens and labels.

    Args:
        dataset: tokenized rows.
        before: rows that count as seen, such as those of the training set.

    Returns:
        `(rows that stay, rows dropped)`.
    """
    num_before = len(before) if before is not None else 0
    digests = np.empty((num_before + len(dataset), 2), dtype=np.uint64)
    if before is not None:
        _digest_rows(before, digests[:num_before])
    _digest_rows(dataset, digests[num_before:])
    keep = first_of_equal(digests)[num_before:]
    return select_rows(dataset, keep), int((~keep).sum())


def first_of_equal(digests: np.ndarray) -> np.ndarray:
    """Which rows are the first with their digest.

    Args:
        digests: uint64 (num_rows, 2).

    Returns:
        bool (num_rows,).
    """
    first = np.zeros(len(digests), dtype=bool)
    part_of = (digests[:, 1] % NUM_PARTS).astype(np.uint8)
    for part in range(NUM_PARTS):
        rows = np.flatnonzero(part_of == part)
        found = digests[rows]
        order = np.lexsort((found[:, 1], found[:, 0]))  # stable: equal ones stay in the order of the rows
        found = found[order]
        differs = np.ones(len(rows), dtype=bool)
        differs[1:] = (found[1:] != found[:-1]).any(axis=1)
        first[rows[order[differs]]] = True
    return first


def _digest_rows(dataset: Dataset, digests: np.ndarray) -> None:
    """Fill `digests`, uint64 (num_rows, 2), with those of the rows."""
    columns = dataset.select_columns(["input_ids", "labels"]).with_format("arrow")
    row = 0
    for table in columns.iter(batch_size=ROWS_PER_READ):
        for ids, labels in zip(_tokens(table, "input_ids"), _tokens(table, "labels"), strict=True):
            digest = xxhash.xxh3_128_digest(ids.tobytes() + b"|" + labels.tobytes())
            digests[row] = np.frombuffer(digest, dtype=np.uint64)
            row += 1


def _tokens(table: pa.Table, column: str) -> Iterator[np.ndarray]:
    """The lists of a column, int64 whatever the column holds."""
    for chunk in filter(len, table.column(column).chunks):
        values = chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        ends = np.cumsum(chunk.value_lengths().to_numpy(zero_copy_only=False))
        yield from np.split(values, ends[:-1])
