"""The order of rows of one epoch, from seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Every row once per epoch. The order depends on nothing but `(seed, epoch)`.

    torch's `RandomSampler` draws from a generator, so its order depends on how often it was asked before: a resumed run,
    or one that looked at the length first, would see other batches.

    Args:
        num_rows: rows of the dataset.
        seed: any non-negative integer.
        shuffle: `False` keeps the order of the dataset in every epoch.
    """

    def __init__(self, num_rows: int, seed: int = 0, shuffle: bool = True):
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> np.ndarray:
        """Row numbers of this epoch, int64."""
        if not self.shuffle:
            return np.arange(self.num_rows)
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.num_rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def __len__(self) -> int:
        return self.num_rows
