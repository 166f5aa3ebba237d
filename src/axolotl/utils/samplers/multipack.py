"""Multipack batch sampler: documents of different lengths packed into rows of a fixed number of tokens.

A batch is a list of bins, a bin is a list of row numbers. The bins are planned once from the lengths, so the number of
batches is known before training starts and is the same in every epoch. The sampler's order decides, per epoch, which
document goes where. Ranks, batch size and worker processes have no say in it: they only cut the one list of bins into
pieces.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, Sampler

from axolotl.exceptions import DatasetError
from axolotl.utils.garbage import without_garbage_collection
from axolotl.utils.logging import get_logger
from axolotl.utils.samplers.best_fit import Plan, deal, join, pack_best_fit, pack_next_fit
from axolotl.utils.samplers.epoch import EpochSampler

LOG = get_logger(__name__)

BATCHES_AT_ONCE = 1000
"""Batches whose row numbers are Python integers at a time; the numbers of an epoch would fill memory."""


def ffd_check(sequence_lengths: np.ndarray, bin_capacity: int, num_bins: int) -> bool:
    """Do sequences of these lengths fit into `num_bins` bins, packed first-fit decreasing?"""
    free = np.full(num_bins, bin_capacity, dtype=np.int64)
    for length in np.sort(np.asarray(sequence_lengths))[::-1]:
        fits = free >= length
        if not fits.any():
            return False
        free[np.argmax(fits)] -= length
    return True


def pack_group(
    sequence_lengths: np.ndarray,
    group_offset: int,
    bin_capacity: int,
    max_bins: int,
    bin_size: int,
    safe_mode: bool = True,
) -> list[list[int]]:
    """Pack one group of sequences into bins.

    Args:
        sequence_lengths: lengths of the sequences of this group.
        group_offset: number added to each index, the place of the group in the dataset.
        bin_capacity: tokens per bin.
        max_bins: more bins than this are not made; sequences that would need them are left out unless `safe_mode`.
        bin_size: sequences per bin at most.
        safe_mode: never leave a sequence out.
    """
    lengths = _check_lengths(sequence_lengths, bin_capacity)
    documents, offsets = deal(pack_best_fit(lengths, bin_capacity, bin_size), np.arange(len(lengths)), lengths)
    bins = _as_lists(documents + group_offset, offsets)
    return bins if safe_mode else bins[:max_bins]


def pack_parallel(
    sequence_lengths: np.ndarray,
    bin_capacity: int,
    group_size: int,
    bin_size: int,
    num_processes: int | None = None,
    safe_mode: bool = True,
    mp_start_method: str | None = "fork",
) -> list[list[int]]:
    """Pack sequences group by group.

    `num_processes`, `safe_mode` and `mp_start_method` are accepted and not needed: a million sequences pack in less time
    than a pool of processes takes to start.

    Returns:
        Bins of indices into `sequence_lengths`.
    """
    del num_processes, safe_mode, mp_start_method
    lengths = _check_lengths(sequence_lengths, bin_capacity)
    plan = _plan(lengths, bin_capacity, bin_size, group_size, sequential=False)
    return _as_lists(*deal(plan, np.arange(len(lengths)), lengths))


def allocate_sequentially(
    sequence_lengths: np.ndarray, rank: int, bin_capacity: int, num_ranks: int
) -> tuple[list[list[int]], int, int]:
    """Pack in order, next-fit, and take every `num_ranks`-th bin.

    Returns:
        `(bins of this rank, tokens in all bins, token slots of all bins)`.
    """
    lengths = _check_lengths(sequence_lengths, bin_capacity)
    plan = pack_next_fit(lengths, bin_capacity, max(1, len(lengths)))
    bins = _as_lists(np.arange(len(lengths)), plan.offsets)
    return bins[rank::num_ranks], int(lengths.sum()), plan.num_bins * bin_capacity


class MultipackBatchSampler(BatchSampler):
    """Batches of bins.

    Args:
        sampler: yields row numbers; its order decides the order of bins. Its `set_epoch` is called by ours.
        batch_size: bins per batch.
        batch_max_len: tokens per bin.
        lengths: tokens of every row of the dataset.
        packing_efficiency_estimate: accepted for compatibility; the count is exact, nothing needs to be estimated.
        drop_last: leave out the last batch when it has fewer than `batch_size` bins. With `False` no row is ever left out:
            the last batch has the bins that are left.
        num_count_samples: accepted for compatibility; the count does not vary.
        sequential: keep the order of rows (next-fit) instead of filling bins best.
        group_size: rows packed at a time, in the order of the dataset.
        bin_size: rows per bin at most.
        num_processes: accepted for compatibility; packing runs in this process.
        safe_mode: accepted for compatibility; packing is always safe.
        mp_start_method: accepted for compatibility.
        one_row: a batch is one bin that holds the rows of `batch_size` bins, for attention that works by document borders.
    """

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        batch_max_len: int,
        lengths: np.ndarray | Sequence[int],
        packing_efficiency_estimate: float = 1.0,
        drop_last: bool = True,
        num_count_samples: int = 4,
        sequential: bool = False,
        group_size: int = 100_000,
        bin_size: int = 200,
        num_processes: int | None = None,
        safe_mode: bool = True,
        mp_start_method: str | None = "fork",
        one_row: bool = False,
        **kwargs: Any,
    ):
        super().__init__(sampler, batch_size, drop_last)
        if kwargs:
            LOG.warning(f"MultipackBatchSampler ignores the arguments {sorted(kwargs)}.")
        self.batch_max_len = batch_max_len
        self.lengths = _check_lengths(lengths, batch_max_len)
        self.packing_efficiency_estimate = packing_efficiency_estimate or 1.0
        self.num_count_samples = num_count_samples
        self.sequential = sequential
        self.group_size = group_size
        self.bin_size = bin_size
        self.num_processes = num_processes
        self.safe_mode = safe_mode
        self.mp_start_method = mp_start_method
        self.one_row = one_row
        self.epoch = 0
        self._planned: Plan | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and tell the sampler when it has epochs."""
        self.epoch = epoch
        set_epoch = getattr(self.sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    @property
    def plan(self) -> Plan:
        """The bins of every epoch, as lengths.

        Planned in the order of the dataset when the sampler yields every row: asking a random sampler for its order would
        advance its generator, and the run would depend on how often the length was asked for.
        """
        if self._planned is None:
            every_row = len(self.sampler) == len(self.lengths)
            order = np.arange(len(self.lengths)) if every_row else self._order()
            self._planned = self._make_plan(self.lengths[order])
        return self._planned

    @without_garbage_collection()
    def _make_plan(self, lengths: np.ndarray) -> Plan:
        return _plan(lengths, self.batch_max_len, self.bin_size, self.group_size, self.sequential)

    def _order(self) -> np.ndarray:
        if isinstance(self.sampler, EpochSampler):
            return self.sampler.order()
        return np.fromiter(self.sampler, dtype=np.int64)

    def _bins(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows bin after bin and the borders between bins, for this epoch, whole batches only if `drop_last`."""
        order = self._order()
        lengths = self.lengths[order]
        plan = self.plan
        if not np.array_equal(np.bincount(lengths), np.bincount(plan.lengths)):
            plan = self._planned = self._make_plan(lengths)  # the sampler yields other rows than last time
        documents, offsets = deal(plan, order, self.lengths)
        if self.sequential:
            in_order = self._make_plan(lengths)
            if in_order.num_bins == plan.num_bins:  # another number of bins would change the number of steps
                documents, offsets = order, in_order.offsets
        return documents, offsets[: len(self) * self.batch_size + 1]

    def __iter__(self) -> Iterator[list[list[int]]]:
        documents, offsets = self._bins()
        step = BATCHES_AT_ONCE * self.batch_size
        for start in range(0, len(offsets) - 1, step):
            borders = offsets[start : start + step + 1]
            flat = documents[borders[0] : borders[-1]].tolist()
            if self.one_row:
                borders = np.append(borders[:-1][:: self.batch_size], borders[-1])
            bins = [flat[a:b] for a, b in itertools.pairwise((borders - borders[0]).tolist())]
            if self.one_row or self.batch_size == 1:
                yield from [[bin_] for bin_ in bins]
            else:
                yield from [bins[first : first + self.batch_size] for first in range(0, len(bins), self.batch_size)]

    def __len__(self) -> int:
        """Batches of an epoch, exact."""
        whole, rest = divmod(self.plan.num_bins, self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def generate_batches(self, set_stats: bool = False) -> list[list[list[int]]]:
        """All batches of this epoch. `set_stats` is accepted for compatibility: statistics follow from the plan."""
        del set_stats
        with without_garbage_collection():
            return list(self)

    @property
    def total_tokens_used(self) -> int:
        return int(self.plan.lengths.sum())

    @property
    def total_token_slots(self) -> int:
        return self.plan.num_bins * self.batch_max_len

    def efficiency(self) -> float:
        """Tokens over token slots, in (0, 1]; 0 when there is nothing to pack."""
        return self.total_tokens_used / self.total_token_slots if self.total_token_slots else 0.0

    def gather_efficiency(self) -> float:
        """The mean of `efficiency` over all ranks."""
        if not _distributed():
            return self.efficiency()
        value = torch.tensor([self.efficiency()], dtype=torch.float64, device=_device())
        dist.all_reduce(value)
        return float(value.item()) / dist.get_world_size()

    def gather_len_batches(self, num: int) -> int:
        """The smallest `num` of all ranks."""
        if not _distributed():
            return num
        value = torch.tensor([num], dtype=torch.int64, device=_device())
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
        return int(value.item())


def _plan(lengths: np.ndarray, capacity: int, bin_size: int, group_size: int, sequential: bool) -> Plan:
    if sequential:
        return pack_next_fit(lengths, capacity, bin_size)
    groups = range(0, len(lengths), group_size)
    return join([pack_best_fit(lengths[start : start + group_size], capacity, bin_size) for start in groups])


def _check_lengths(lengths: np.ndarray | Sequence[int], capacity: int) -> np.ndarray:
    """Lengths as int64. A row without tokens counts as one, so that it takes a place."""
    checked = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
    if len(checked) and checked.max() > capacity:
        row = int(np.argmax(checked))
        raise DatasetError(
            f"row {row} has {checked[row]} tokens and cannot be packed into rows of {capacity}. Raise `sequence_len`, or "
            "set `excess_length_strategy: drop` or `truncate` so that long rows are handled when the dataset is prepared."
        )
    return checked


def _as_lists(documents: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    flat, borders = documents.tolist(), offsets.tolist()
    return [flat[a:b] for a, b in itertools.pairwise(borders)]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
