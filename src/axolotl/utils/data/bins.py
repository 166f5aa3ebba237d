"""A dataset that is asked for whole batches: rows, bins of rows, or none at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from datasets import Dataset

from axolotl.utils.collators.core import IGNORE_INDEX


class NoRows(list):
    """What stands for a batch without rows before it is collated: a row of the dataset that carries no loss."""


class EmptyBatch(dict):
    """A collated batch without rows. It is computed like any other, but nothing of it counts."""


class BinDataset:
    """Lets a PyTorch DataLoader fetch the batches of `MultipackBatchSampler` and `EvenBatches`, without a patch.

    The DataLoader hands a batch to `__getitems__`. A flat list of row numbers gives rows, a list of lists gives the rows of
    each bin; all rows of a batch are read at once. An empty list gives `NoRows`, for `CollateEmpty`.

    Args:
        dataset: rows.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.dataset[row]

    def __getitems__(self, batch: Sequence[int] | Sequence[Sequence[int]]) -> list[Any]:
        if not batch:
            return NoRows(self._rows([0]))
        if not any(isinstance(bin_, (list, tuple)) for bin_ in batch):
            return self._rows(cast("Sequence[int]", batch))
        bins = cast("Sequence[Sequence[int]]", batch)
        rows = iter(self._rows([row for bin_ in bins for row in bin_]))
        return [[next(rows) for _ in bin_] for bin_ in bins]

    def _rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        if not numbers:
            return []
        if not isinstance(self.dataset, Dataset):
            return [self.dataset[number] for number in numbers]
        columns = self.dataset[list(numbers)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class CollateEmpty:
    """A collator that also takes `NoRows`, whose row it collates as usual and then takes every label from.

    Args:
        collate: rows, or bins of rows, to a batch with `labels`.
    """

    def __init__(self, collate: Callable[[Any], Mapping[str, Any]]):
        self.collate = collate

    def __call__(self, features: Any) -> Mapping[str, Any]:
        batch = self.collate(features)
        if not isinstance(features, NoRows):
            return batch
        return EmptyBatch({**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)})
