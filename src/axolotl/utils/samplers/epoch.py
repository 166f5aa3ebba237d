"""The order of the rows of one epoch, from seed and epoch alone, and its batches for several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, Protocol

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


class LengthGroupedEpochSampler(EpochSampler):
    """Rows of similar length next to each other, in an order that depends on nothing but `(seed, epoch)`.

    The shuffled rows are cut into groups of 50 batches and sorted by length within a group, longest first; the longest row
    of all comes first, so that an out-of-memory error shows at once.

    Args:
        lengths: tokens of every row.
        batch_size: rows per optimizer step, on all ranks together.
        seed: any non-negative integer.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0):
        super().__init__(len(lengths), seed)
        self.lengths = lengths
        self.batch_size = batch_size

    def order(self) -> np.ndarray:
        order = super().order()
        if not len(order):
            return order
        group = 50 * self.batch_size
        groups = [order[start : start + group] for start in range(0, len(order), group)]
        grouped = np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in groups])
        longest = int(np.argmax(self.lengths[grouped]))
        grouped[[0, longest]] = grouped[[longest, 0]]
        return grouped


class Batches(Sized, Iterable[list[Any]], Protocol):
    """A batch sampler."""


class EvenBatches(Sampler[list[Any]]):
    """The batches of a batch sampler, as many for every rank. Ranks take turns: batch `b` is for rank `b % num_ranks`.

    So an optimizer step takes the same rows whatever the number of ranks. When the last round is not full, the ranks that
    no batch is left for get an empty one, `[]`, of which `axolotl.utils.data.bins` makes a batch without any loss: no row
    is left out, and none counts twice.

    Args:
        batches: the batch sampler.
        num_ranks: ranks that see different data.
        drop_last: leave the last round out when it is not full.
        repeat: fill the last round with the first batches instead of empty ones, for losses that are means over a batch
            and undefined without any label.
    """

    # accelerate fills batches up to this size with rows of the first batches, unless it is None.
    batch_size: int | None = None

    def __init__(self, batches: Batches, num_ranks: int = 1, *, drop_last: bool = False, repeat: bool = False):
        self.batches = batches
        self.num_ranks = num_ranks
        self.drop_last = drop_last
        self.repeat = repeat

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the batch sampler, or of the sampler within it, when it has epochs."""
        for owner in (self.batches, getattr(self.batches, "sampler", None)):
            set_epoch = getattr(owner, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
                return

    def __iter__(self) -> Iterator[list[Any]]:
        first: list[list[Any]] = []
        number = 0
        for number, batch in enumerate(self.batches, start=1):
            if self.drop_last and number > len(self):
                return
            if len(first) < self.num_ranks:
                first.append(batch)
            yield batch
        for extra in range(len(self) - number):
            yield first[extra % len(first)] if self.repeat else []

    def __len__(self) -> int:
        rounds, rest = divmod(len(self.batches), self.num_ranks)
        return (rounds + bool(rest and not self.drop_last)) * self.num_ranks
