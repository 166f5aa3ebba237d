"""What is read off tokenized rows, and which rows stay: trained tokens, length policy, positions.

Whole columns are looked at through their Arrow offsets, so a million rows take a moment and no row becomes a Python list.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset
from datasets.table import InMemoryTable

from axolotl.exceptions import DatasetError
from axolotl.prompt_tokenizers import RowName, name_row
from axolotl.utils.samplers.utils import get_dataset_lengths, list_lengths

IGNORE_INDEX = -100
FILTERED = "left out by `filter_rows` of the strategy"
PER_TOKEN = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids")


def list_chunks(dataset: Dataset, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`(values, offsets)` of a list column, chunk by chunk, in the order of the Arrow table."""
    for chunk in dataset.data.column(column).chunks:
        values = chunk.flatten().to_numpy(zero_copy_only=False)
        lengths = np.nan_to_num(chunk.value_lengths().to_numpy(zero_copy_only=False), nan=0).astype(np.int64)
        yield values, np.concatenate([[0], np.cumsum(lengths)])


def count_trained_tokens(dataset: Dataset) -> np.ndarray:
    """Tokens of every row that the loss sees, int64. The first token of a row is foretold by nothing and never counts."""
    counts = []
    for values, offsets in list_chunks(dataset, "labels"):
        trained = values != IGNORE_INDEX
        sums = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
        count = sums[offsets[1:]] - sums[offsets[:-1]]
        filled = offsets[1:] > offsets[:-1]
        count[filled] -= trained[offsets[:-1][filled]]
        counts.append(count)
    found = np.concatenate(counts) if counts else np.zeros(0, np.int64)
    return found if dataset._indices is None else found[dataset._indices.column(0).to_numpy()]


def check_token_columns(dataset: Dataset, name: str, name_row: RowName = name_row) -> None:
    """Rows that are said to be tokens must be lists of integers of one length. `name_row` is what errors call a row.

    Raises:
        DatasetError: names dataset, row and field.
    """
    lengths = None
    for column in ("input_ids", "labels", "attention_mask"):
        if column not in dataset.column_names:
            continue
        arrow_type = dataset.data.schema.field(column).type
        is_list = pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type)
        if not is_list or not pa.types.is_integer(arrow_type.value_type):
            raise DatasetError(f"dataset {name}: field `{column}` must hold lists of integers, not {arrow_type}.")
        if dataset.data.column(column).null_count:
            missing = dataset.data.column(column).is_null().to_numpy()
            missing = missing if dataset._indices is None else missing[dataset._indices.column(0).to_numpy()]
            if missing.any():
                raise DatasetError(f"dataset {name}, {name_row(int(np.argmax(missing)))}: field `{column}` is missing.")
        own = list_lengths(dataset, column)
        if lengths is None:
            lengths = own
        elif (own != lengths).any():
            row = int(np.argmax(own != lengths))
            raise DatasetError(
                f"dataset {name}, {name_row(row)}: `{column}` has {own[row]} entries but `input_ids` has {lengths[row]}."
            )


def apply_length_policy(
    dataset: Dataset,
    name: str,
    *,
    sequence_len: int,
    min_len: int,
    strategy: str,
    key: str = "sequence_len",
    name_row: RowName = name_row,
) -> tuple[Dataset, np.ndarray, dict[str, int], int]:
    """Handle rows that are too long or too short.

    Args:
        dataset: tokenized rows.
        name: the dataset as the user knows it, for messages.
        sequence_len: most tokens of a row.
        min_len: fewest tokens of a row.
        strategy: `drop`, `truncate` or `raise` for rows that are too long.
        key: the key that set `sequence_len`.
        name_row: what errors call a row.

    Returns:
        `(all rows, bool for each whether it stays, {reason: rows dropped}, rows truncated)`.
    """
    lengths = get_dataset_lengths(dataset)
    too_long = lengths > sequence_len
    num_long = int(too_long.sum())
    if num_long and strategy == "raise":
        row = int(np.argmax(too_long))
        raise DatasetError(
            f"dataset {name}: {num_long} rows are longer than `{key}: {sequence_len}`; the first is {name_row(row)} with "
            f"{lengths[row]} tokens. Raise `{key}`, or write `excess_length_strategy: drop` or `truncate`."
        )
    truncated = 0
    if num_long and strategy == "truncate":
        dataset = dataset.map(
            truncate_rows,
            batched=True,
            fn_kwargs={"sequence_len": sequence_len},
            desc=f"Truncating to {sequence_len} tokens",
        )
        lengths = np.minimum(lengths, sequence_len)
        truncated = num_long
    dropped = {
        f"longer than `{key}: {sequence_len}`": int((lengths > sequence_len).sum()),
        f"shorter than {min_len} tokens": int((lengths < min_len).sum()),
    }
    keep = (lengths <= sequence_len) & (lengths >= min_len)
    return dataset, keep, {reason: count for reason, count in dropped.items() if count}, truncated


def truncate_rows(rows: dict[str, list[Any]], sequence_len: int) -> dict[str, list[Any]]:
    """Cut every per-token column of a batch of rows."""
    cut = {name: [value[:sequence_len] for value in rows[name]] for name in PER_TOKEN if name in rows}
    return {**cut, "length": [len(ids) for ids in cut["input_ids"]]} if "length" in rows else cut


def select_rows(dataset: Dataset, keep: np.ndarray) -> Dataset:
    """The rows where `keep` is true; the dataset itself when that is all of them."""
    return dataset if keep.all() else take_rows(dataset, np.flatnonzero(keep))


def take_rows(dataset: Dataset, numbers: np.ndarray) -> Dataset:
    """The rows of these numbers, in their order. `Dataset.select` does the same, but by way of 40 bytes of Python objects per row."""
    if not len(numbers) or (int(numbers[-1]) - int(numbers[0]) + 1 == len(numbers) and (np.diff(numbers) == 1).all()):
        return dataset.select(range(int(numbers[0]), int(numbers[-1]) + 1) if len(numbers) else [])
    places = numbers if dataset._indices is None else dataset._indices.column(0).to_numpy()[numbers]
    fingerprint = xxhash.xxh64(dataset._fingerprint.encode())
    fingerprint.update(np.ascontiguousarray(numbers))
    return Dataset(
        dataset.data,
        info=dataset.info,
        split=dataset.split,
        indices_table=InMemoryTable(pa.table({"indices": pa.array(places, type=pa.uint64())})),
        fingerprint=fingerprint.hexdigest(),
    )


def add_position_ids(sample: dict[str, Any]) -> dict[str, Any]:
    """Add `position_ids` (0, 1, 2, ...) and `length`.

    Handles a single row, `sample["input_ids"]` a list of ints, and a batch of rows, a list of lists. Empty stays empty.
    """
    ids = sample["input_ids"]
    if len(ids) and not isinstance(ids[0], (int, np.integer)):
        sample["position_ids"] = [list(range(len(row))) for row in ids]
        sample["length"] = [len(row) for row in ids]
    else:
        sample["position_ids"] = list(range(len(ids)))
        sample["length"] = len(ids)
    return sample


def add_length(sample: dict[str, Any]) -> dict[str, Any]:
    """Add `length`, the number of tokens of a row."""
    sample["length"] = len(sample["input_ids"])
    return sample


def add_pose_position_ids(
    sample: dict[str, Any],
    max_context_len: int = 32768,
    split_on_token_ids: list[int] | None = None,
    chunks: int = 2,
) -> dict[str, Any]:
    """Positions that skip ahead, so that a model learns distances longer than its rows (PoSE, arXiv:2309.10400).

    The row is cut into chunks; before each chunk but the first, positions jump by a random part of what is left of
    `max_context_len`. With `split_on_token_ids` a jump comes only right before one of these tokens, and every such place may
    take one; otherwise the row is cut into `chunks` pieces at random places.

    Args:
        sample: a row; gets `position_ids` and `sequence_len` (the last position plus one), `length`.
        max_context_len: positions stay below this.
        split_on_token_ids: tokens before which positions may jump.
        chunks: pieces, when `split_on_token_ids` is not given.
    """
    ids = sample["input_ids"]
    num_tokens = len(ids)
    room = max(max_context_len - num_tokens, 0)
    if split_on_token_ids:
        cuts = [index for index, token in enumerate(ids) if index and token in set(split_on_token_ids)]
    else:
        cuts = (
            sorted(random.sample(range(1, num_tokens), min(chunks - 1, max(num_tokens - 1, 0))))
            if num_tokens > 1
            else []
        )
    # Sorted draws from the whole room share it evenly over the cuts: each jump has the same distribution.
    offsets = sorted(random.randint(0, room) for _ in cuts)
    positions: list[int] = []
    for start, stop, offset in zip([0, *cuts], [*cuts, num_tokens], [0, *offsets], strict=True):
        positions += range(start + offset, stop + offset)
    sample["position_ids"] = positions
    sample["length"] = num_tokens
    sample["sequence_len"] = positions[-1] + 1 if positions else 0
    return sample


def drop_long_seq(sample: dict[str, Any], sequence_len: int = 2048, min_sequence_len: int = 2) -> bool | list[bool]:
    """Whether a row stays: its length is from `min_sequence_len` to `sequence_len`.

    Takes a single row (list of ints) or a batch (list of lists), and answers with a bool or a list of bools.
    """
    ids = sample["input_ids"]
    if len(ids) and not isinstance(ids[0], (int, np.integer)):
        return [min_sequence_len <= len(row) <= sequence_len for row in ids]
    return min_sequence_len <= len(ids) <= sequence_len
