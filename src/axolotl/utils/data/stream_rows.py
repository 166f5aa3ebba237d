"""Tokenized rows of a stream: as arrays, and which of them stay."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from axolotl.exceptions import DatasetError
from axolotl.utils.data.rows import IGNORE_INDEX, PER_TOKEN, add_pose_position_ids
from axolotl.utils.data.tokenize import TOKEN_COLUMNS
from axolotl.utils.samplers.best_fit import pack_next_fit

TokenRow = dict[str, np.ndarray]
"""`input_ids`, `labels`, `attention_mask` and other columns with a number per token, int32."""


def as_token_rows(made: Mapping[str, Any], name: str) -> list[TokenRow]:
    """What a strategy made of a row, or of several, as rows of arrays.

    Args:
        made: columns; each holds the numbers of one row, or a list of them per row.
        name: the dataset, for messages.

    Raises:
        DatasetError: a column has not one number per token.
    """
    ids = made["input_ids"]
    several = len(ids) > 0 and isinstance(ids[0], (list, tuple, np.ndarray))
    columns = {key: made[key] if several else [made[key]] for key in PER_TOKEN if made.get(key) is not None}
    rows = []
    for index in range(len(columns["input_ids"])):
        row = {key: np.asarray(values[index], dtype=np.int32) for key, values in columns.items()}
        row.setdefault("attention_mask", np.ones(len(row["input_ids"]), dtype=np.int32))
        if len({len(value) for value in row.values()}) > 1:
            lengths = ", ".join(f"`{key}` {len(value)}" for key, value in row.items())
            raise DatasetError(f"dataset {name}: the columns of a row have different lengths: {lengths}.")
        rows.append(row)
    return rows


def take_token_row(row: Mapping[str, Any], number: int, name: str) -> list[TokenRow]:
    """A row of a source that holds tokens already.

    Raises:
        DatasetError: a column is no list of whole numbers, or one is missing. Names dataset, row and field.
    """
    for key in PER_TOKEN:
        value = row.get(key)
        if value is None and key in TOKEN_COLUMNS:
            raise DatasetError(f"dataset {name}, row {number}: field `{key}` is missing.")
        if value is not None and not _are_tokens(value):
            raise DatasetError(
                f"dataset {name}, row {number}: field `{key}` must hold a list of whole numbers below 2**31."
            )
    try:
        return as_token_rows(row, name)
    except DatasetError as error:
        raise DatasetError(f"row {number}: {error}") from error


def _are_tokens(value: Any) -> bool:
    if not isinstance(value, (list, tuple, np.ndarray)):
        return False
    try:
        values = np.asarray(value)
    except ValueError:  # lists of different lengths
        return False
    if values.ndim != 1 or not len(values):
        return values.ndim == 1
    return values.dtype.kind in "iu" and int(values.min()) >= -(2**31) and int(values.max()) < 2**31


def join_texts(rows: Sequence[TokenRow], max_tokens: int, pad_token_id: int, fill: bool = False) -> list[TokenRow]:
    """Rows put one after the other, with a pad token after each that leaves room for one, into rows of at most `max_tokens`.

    The first token of a row is not trained: it would have to be foretold from a pad token.

    Args:
        rows: not longer than `max_tokens`.
        max_tokens: tokens per joined row.
        pad_token_id: gets attention 0 and label -100.
        fill: also fill up the rest of each joined row.
    """
    if not rows:
        return []
    names = [name for name in rows[0] if all(name in row for row in rows)]
    pad = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
    lengths = np.minimum([len(row["input_ids"]) + 1 for row in rows], max_tokens)
    joined = []
    for start, stop in itertools.pairwise(pack_next_fit(lengths, max_tokens, len(rows)).offsets.tolist()):
        columns = {}
        for name in names:
            end = np.array([pad.get(name, 0)], dtype=np.int32)
            column = np.concatenate([piece for row in rows[start:stop] for piece in (row[name], end)])[:max_tokens]
            columns[name] = np.concatenate([column, end.repeat(max_tokens - len(column))]) if fill else column
        firsts = np.cumsum([0, *(len(row["input_ids"]) + 1 for row in rows[start : stop - 1])])
        columns["labels"][firsts] = IGNORE_INDEX
        joined.append(columns)
    return joined


@dataclass(frozen=True)
class RowPolicy:
    """Which tokenized rows stay, and their positions.

    Attributes:
        sequence_len: rows are not longer.
        min_len: nor shorter.
        strategy: `drop`, `truncate` or `raise` for longer ones.
        pose: arguments of `add_pose_position_ids`, or None.
        seed: of the positions.
    """

    sequence_len: int
    min_len: int = 2
    strategy: str = "drop"
    pose: Mapping[str, Any] | None = None
    seed: int = 0

    def apply(self, rows: Sequence[TokenRow], name: str, counts: dict[str, int]) -> list[TokenRow]:
        """The rows that stay. What is dropped or cut is added to `counts`.

        Raises:
            DatasetError: a row is too long and `strategy` is `raise`.
        """
        kept = []
        for row in rows:
            length = len(row["input_ids"])
            reason = None
            if length > self.sequence_len:
                if self.strategy == "raise":
                    raise DatasetError(
                        f"dataset {name}: a row has {length:,} tokens, more than `sequence_len: {self.sequence_len}`. Raise "
                        "`sequence_len`, or write `excess_length_strategy: drop` or `truncate`."
                    )
                if self.strategy == "truncate":
                    row = {key: value[: self.sequence_len] for key, value in row.items()}
                    count(counts, f"cut to {self.sequence_len} tokens")
                else:
                    reason = f"longer than {self.sequence_len} tokens"
            elif length < self.min_len:
                reason = f"shorter than {self.min_len} tokens"
            if reason is None and not (row["labels"][1:] != IGNORE_INDEX).any():
                reason = "without a trained token"
            if reason is not None:
                count(counts, reason)
                continue
            kept.append(self._with_pose(row) if self.pose else row)
        return kept

    def _with_pose(self, row: TokenRow) -> TokenRow:
        """Positions for PoSE, drawn from the row alone, so that they are the same whoever reads it."""
        state = random.getstate()
        random.seed(f"{self.seed}:{row['input_ids'].tobytes().hex()}")
        try:
            posed = add_pose_position_ids({"input_ids": row["input_ids"].tolist()}, **(self.pose or {}))
        finally:
            random.setstate(state)
        return {**row, "position_ids": np.asarray(posed["position_ids"], dtype=np.int32)}


def count(counts: dict[str, int], reason: str, number: int = 1) -> None:
    """Add to what became of rows."""
    counts[reason] = counts.get(reason, 0) + number
