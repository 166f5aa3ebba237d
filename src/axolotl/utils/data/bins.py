"""A dataset that is asked for bins of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from datasets import Dataset


class BinDataset:
    """Lets a PyTorch DataLoader fetch the batches of `MultipackBatchSampler`, without a patch.

    The DataLoader hands a batch to `__getitems__`. A flat list of row numbers gives rows, a list of lists gives the rows of
    each bin; all rows of a batch are read at once.

    Args:
        dataset: rows.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.dataset[row]

    def __getitems__(self, batch: Sequence[int] | Sequence[Sequence[int]]) -> list[Any]:
        if not any(isinstance(bin_, (list, tuple)) for bin_ in batch):
            return self._rows(cast("Sequence[int]", batch))
        bins = cast("Sequence[Sequence[int]]", batch)
        rows = iter(self._rows([row for bin_ in bins for row in bin_]))
        return [[next(rows) for _ in bin_] for bin_ in bins]

    def _rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        if not numbers:
            return []
        columns = self.dataset[list(numbers)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
