"""Lengths of the rows of a dataset, without reading the tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset


def get_dataset_lengths(dataset: Dataset | Iterable[dict[str, Any]], from_arrow: bool = True) -> np.ndarray:
    """Number of tokens of every row.

    Args:
        dataset: rows with a `length` column, or with `input_ids`.
        from_arrow: read list offsets from the Arrow table instead of the rows. Rows are always read one by one when the
            dataset is not an Arrow dataset.

    Returns:
        int64 array, one length per row.
    """
    if not isinstance(dataset, Dataset) or not from_arrow:
        return np.fromiter((len(row["input_ids"]) for row in dataset), dtype=np.int64)
    if "length" in dataset.column_names:
        return _in_order(dataset, dataset.data.column("length").to_numpy().astype(np.int64))
    return list_lengths(dataset, "input_ids")


def list_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """Lengths of the lists in `column`, read from the list offsets of the Arrow table."""
    table_column: pa.ChunkedArray = dataset.data.column(column)
    chunks = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in table_column.chunks]
    lengths = np.concatenate(chunks) if chunks else np.zeros(0)
    return _in_order(dataset, np.nan_to_num(lengths, nan=0).astype(np.int64))


def _in_order(dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """Values of the rows of the Arrow table in the order of the dataset."""
    return values if dataset._indices is None else values[dataset._indices.column(0).to_numpy()]
