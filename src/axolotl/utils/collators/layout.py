"""Rows of tokens laid out in a (B, T) block. Numpy in, numpy out; the collators turn the block into tensors once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

Row = Mapping[str, Any]


BOOKKEEPING = frozenset({"length"})
"""Columns that no model takes."""

PADDING_DOCUMENT = 256
"""Tokens of padding that attend to each other at most, where no document is longer."""


def token_arrays(row: Row) -> dict[str, np.ndarray]:
    """The columns of a row that hold one number per token, as arrays. Text, nested and scalar columns are not for the model."""
    num_tokens = len(row["input_ids"])
    arrays: dict[str, np.ndarray] = {}
    for name, value in row.items():
        if name in BOOKKEEPING or not isinstance(value, (list, tuple, np.ndarray, torch.Tensor)):
            continue
        if not num_tokens:
            arrays[name] = np.zeros(0, dtype=np.int64)
            continue
        if np.ndim(value) if isinstance(value, (np.ndarray, torch.Tensor)) else len(value) == num_tokens:
            array = np.asarray(value)
            if array.shape == (num_tokens,) and array.dtype.kind in "iufb":
                arrays[name] = array
    return arrays


def join_rows(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The per-token columns that all rows have, row after row."""
    arrays = [token_arrays(row) for row in rows]
    names = [name for name in arrays[0] if all(name in other for other in arrays)]
    return {name: np.concatenate([array[name] for array in arrays]) for name in names}


def padded_length(longest: int, multiple: int | None) -> int:
    """`longest` rounded up to `multiple`."""
    return -(-longest // multiple) * multiple if multiple else longest


def pad_block(rows: Sequence[np.ndarray], width: int, pad: int | float, left: bool = False) -> np.ndarray:
    """Rows of different lengths as a (len(rows), width) block filled up with `pad`. Integers become int64."""
    kind = np.result_type(*rows).kind if rows else "i"
    block = np.full((len(rows), width), pad, dtype=np.float32 if kind == "f" else np.int64)
    for line, row in zip(block, rows, strict=True):
        if left:
            line[width - len(row) :] = row
        else:
            line[: len(row)] = row
    return block


def document_positions(lengths: Sequence[int]) -> np.ndarray:
    """0, 1, 2, ... restarting at every document."""
    lengths_ = np.asarray(lengths, dtype=np.int64)
    total = int(lengths_.sum())
    starts = np.cumsum(lengths_) - lengths_
    return np.arange(total) - np.repeat(starts, lengths_)


def document_borders(lengths: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, int]:
    """Cumulative lengths over a (B, width) block read row after row.

    Padding at the end of a row is cut into documents no longer than the longest real one, or `PADDING_DOCUMENT`: attention takes
    the square of a document's length, and most of a long row may be padding.

    Args:
        lengths: per row of the block, the lengths of its documents.
        width: tokens per row with padding.

    Returns:
        `(borders, longest)`: int32 (D + 1,) starting at 0 and ending at B * width, and the longest document.
    """
    pieces: list[int] = []
    most = max([PADDING_DOCUMENT, *(n for row in lengths for n in row)])
    for row in lengths:
        pieces += [n for n in row if n]
        whole, rest = divmod(width - sum(row), most)
        pieces += [most] * whole + [rest] * (rest > 0)
    return np.concatenate([[0], np.cumsum(pieces)]).astype(np.int32), max(pieces, default=0)
