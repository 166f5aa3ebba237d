"""Sources of a stream: rows one by one, from a place that can be noted and gone back to.

A source is read over and over; each time through is a pass. Its position is a small mapping that goes into a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from axolotl.exceptions import AxolotlError, DatasetError
from axolotl.utils.data.compressed import name_damaged_files
from axolotl.utils.data.files import FILL_IT
from axolotl.utils.data.shared import READ_ERRORS, datasets_with_name_generator, first_cause, load_dataset_with_config
from axolotl.utils.data.tokenize import dataset_name
from axolotl.utils.dict import DictDefault

Row = dict[str, Any]

ROWS_PER_READ = 64
"""Rows taken from `datasets` at a time. A position is the start of such a read and a number of rows in it."""

_SLICE = re.compile(r"(?P<name>[^\[\]]+)\[(?P<start>\d*):(?P<stop>\d*)\]")


class StreamSource:
    """The rows of one dataset, pass after pass.

    Args:
        dataset: the rows, in their order.
        name: the dataset as the user wrote it.
        seed: chooses the order of files of every pass; None keeps the order.
        stride: `(n, i)` takes rows i, i + n, i + 2n, ...
    """

    def __init__(
        self, dataset: IterableDataset, name: str, *, seed: int | None = None, stride: tuple[int, int] = (1, 0)
    ):
        self.dataset = dataset
        self.name = name
        self.seed = seed
        self.stride = stride
        self.passes = 0
        self.row = 0  # the next row of this pass
        self._read_start: dict[str, Any] | None = None  # position of `datasets` before the current read
        self._taken = 0  # rows of the current read that were given out
        self._rows: Iterator[Row] | None = None

    def next(self) -> tuple[int, Row] | None:
        """Number and content of the next row; None at the end of a pass, after which the next pass begins.

        Raises:
            DatasetError: the source cannot be read, or a whole pass had no row.
        """
        if self._rows is None:
            self._rows = self._read()
        for row in self._rows:
            number, self.row = self.row, self.row + 1
            if number % self.stride[0] == self.stride[1]:
                return number, row
        if self.row <= self.stride[1]:
            raise DatasetError(
                f"dataset {self.name} has too few rows."
                if self.row
                else f"dataset {self.name} holds no rows. {FILL_IT}"
            )
        self.passes, self.row = self.passes + 1, 0
        self._read_start, self._taken, self._rows = None, 0, None
        return None

    def _read(self) -> Iterator[Row]:
        name_damaged_files()
        if self.seed is not None:
            # `datasets` orders the files by this number. 0 means their own order, so it is never 0.
            self.dataset.set_epoch(self.seed * 100_003 + self.passes + 1)
        self.dataset.load_state_dict(self._read_start)
        first = self._taken
        for batch in self._batches():
            size = len(next(iter(batch.values())))
            for index in range(first, size):
                self._taken = index + 1
                yield {key: values[index] for key, values in batch.items()}
            first = 0
            self._read_start, self._taken = self.dataset.state_dict(), 0

    def _batches(self) -> Iterator[dict[str, list[Any]]]:
        # `iter` and not `__iter__`: the latter would split the rows among the workers of a DataLoader, as we do already.
        try:
            for batch in self.dataset.iter(batch_size=ROWS_PER_READ):
                if not batch:
                    raise DatasetError(f"dataset {self.name}: rows from {self.row:,} on have no fields.")
                yield batch
        except AxolotlError:
            raise
        except READ_ERRORS as error:
            raise DatasetError(
                f"dataset {self.name} cannot be read after row {self.row:,}: {first_cause(error)}"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {"pass": self.passes, "row": self.row, "read": self._read_start, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self.passes, self.row = int(state["pass"]), int(state["row"])
        self._read_start, self._taken, self._rows = state["read"], int(state["taken"]), None


def open_sources(
    entries: Sequence[DictDefault], *, seed: int | None, use_auth_token: bool | None = None
) -> list[tuple[DictDefault, StreamSource]]:
    """Every dataset of a stream with its entry. A list under `name` gives one source per name.

    Args:
        entries: entries of `datasets` or `pretraining_dataset`.
        seed: see `StreamSource`.
        use_auth_token: send the stored Hugging Face token.
    """
    opened = []
    for entry in datasets_with_name_generator([DictDefault(entry) for entry in entries]):
        dataset = open_iterable(entry, use_auth_token)
        stride = (int(entry.shards), int(entry.shards_idx or 0)) if entry.shards else (1, 0)
        if not 0 <= stride[1] < stride[0]:
            raise DatasetError(f"`shards_idx: {stride[1]}` of dataset {entry.path} must be from 0 to {stride[0] - 1}.")
        opened.append((entry, StreamSource(dataset, dataset_name(entry), seed=seed, stride=stride)))
    return opened


def open_iterable(entry: DictDefault, use_auth_token: bool | None = None) -> IterableDataset:
    """The rows of an entry, read as they are asked for, without those that `split` and `skip` leave out."""
    name, start, stop = _rows_of_split(entry)
    dataset = load_dataset_with_config(DictDefault({**entry, "split": name}), use_auth_token, streaming=True)
    if isinstance(dataset, Dataset):
        if not len(dataset):
            raise DatasetError(f"dataset {dataset_name(entry)} holds no rows. {FILL_IT}")
        dataset = dataset.to_iterable_dataset()
    if stop is not None:
        dataset = dataset.take(stop)
    start += int(entry.skip or 0)
    return dataset.skip(start) if start else dataset


def _rows_of_split(entry: DictDefault) -> tuple[str | None, int, int | None]:
    """`train[100:200]` as its name and rows. A share of a stream is not known before its end."""
    split = entry.split
    if not split or "[" not in split:
        return split, 0, None
    match = _SLICE.fullmatch(split)
    if match is None:
        raise DatasetError(
            f"`split: {split}` of dataset `path: {entry.path}` cannot be streamed: only rows counted from the start are "
            "known. Write numbers, such as `train[1000:]`, or remove `streaming: true`."
        )
    return match["name"], int(match["start"] or 0), int(match["stop"]) if match["stop"] else None
