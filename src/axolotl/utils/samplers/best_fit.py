"""Bin packing of documents by their lengths.

Best-fit decreasing (Johnson 1974; 11/9 OPT + 6/9 bins at worst) looks only at lengths, so documents of equal length are
interchangeable: it is run on the histogram, several documents to a bin at a time. Where most lengths differ, the longer
documents are placed by whole arrays instead (`_pack_rounds`), which is as tight as long as shorter ones follow that fill
the gaps. The result is a `Plan`, bins of lengths; which document takes which slot is decided per epoch (`deal`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Bins as lengths.

    Attributes:
        lengths: int64 (num_slots,), the length that each slot holds, bin after bin, longest first within a bin.
        offsets: int64 (num_bins + 1,), the slots of bin `b` are `offsets[b]:offsets[b + 1]`.
    """

    lengths: np.ndarray
    offsets: np.ndarray

    @property
    def num_bins(self) -> int:
        return len(self.offsets) - 1


def pack_best_fit(lengths: np.ndarray, capacity: int, bin_size: int) -> Plan:
    """Pack documents into few bins.

    Args:
        lengths: int64 (num_documents,), each in [1, capacity].
        capacity: tokens that a bin holds.
        bin_size: documents that a bin holds at most.
    """
    if not len(lengths):
        return Plan(np.zeros(0, np.int64), np.zeros(1, np.int64))
    longest_first = np.sort(np.asarray(lengths, dtype=np.int64))[::-1]
    bins = _Bins(len(lengths), capacity, bin_size, shortest=int(longest_first[-1]))
    num_long = _num_to_place_in_rounds(longest_first)
    bin_of = _pack_rounds(longest_first[:num_long], bins)
    bin_of = np.concatenate([bin_of, _pack_histogram(longest_first[num_long:], bins)])
    best = _as_plan(longest_first, bin_of, bins.count)
    if int(np.diff(best.offsets).max()) < bin_size:
        return best
    # Short documents come last, so some bins reached `bin_size` half empty: an even mix may need fewer.
    return pack_even(lengths, capacity, bin_size, best.num_bins) or best


def _as_plan(longest_first: np.ndarray, bin_of: np.ndarray, num_bins: int) -> Plan:
    offsets = np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=num_bins))])
    return Plan(longest_first[stable_order(bin_of)], offsets)


def pack_even(lengths: np.ndarray, capacity: int, bin_size: int, fewer_than: int) -> Plan | None:
    """Fill all bins evenly.

    Longest first, always to the emptiest bins (the LPT rule of Graham 1969), a quarter of the bins at a time. The number of
    bins starts at what tokens and documents need at least and grows a little until nothing overflows.

    Returns:
        A plan with fewer bins than `fewer_than`, or None.
    """
    longest_first = np.sort(lengths)[::-1]
    num_bins = max(-(-int(lengths.sum()) // capacity), -(-len(lengths) // bin_size))
    while num_bins < fewer_than:
        bin_of = _spread(longest_first, num_bins, capacity, bin_size)
        if bin_of is not None:
            return _as_plan(longest_first, bin_of, num_bins)
        num_bins += max(1, num_bins // 500)
    return None


def _spread(longest_first: np.ndarray, num_bins: int, capacity: int, bin_size: int) -> np.ndarray | None:
    """The bin of every document, or None when a bin overflows."""
    loads = np.zeros(num_bins, dtype=np.int64)
    documents = np.zeros(num_bins, dtype=np.int64)
    bin_of = np.empty(len(longest_first), dtype=np.int64)
    at_once = max(1, num_bins // 4)
    for start in range(0, len(longest_first), at_once):
        batch = longest_first[start : start + at_once]
        emptiest = np.argsort(np.where(documents < bin_size, loads, capacity + 1), kind="stable")[: len(batch)]
        loads[emptiest] += batch
        documents[emptiest] += 1
        bin_of[start : start + at_once] = emptiest
    return bin_of if loads.max() <= capacity and documents.max() <= bin_size else None


class _Bins:
    """Bins that are being filled.

    Attributes:
        free: int64, tokens that each bin still takes; one entry per document, of which the first `count` are bins.
        used: int64, documents in each bin.
        count: number of bins.
    """

    def __init__(self, num_documents: int, capacity: int, bin_size: int, shortest: int):
        self.capacity = capacity
        self.bin_size = bin_size
        self.shortest = shortest
        self.free = np.full(num_documents, capacity, dtype=np.int64)
        self.used = np.zeros(num_documents, dtype=np.int64)
        self.count = 0

    def are_open(self, bins: np.ndarray) -> np.ndarray:
        """Those of `bins` that take one more of the shortest documents."""
        return bins[(self.free[bins] >= self.shortest) & (self.used[bins] < self.bin_size)]


# One document after the other where that takes few steps: there are few, or many share a length.
FEW_DOCUMENTS = 20_000
DOCUMENTS_PER_LENGTH = 8
# Elsewhere most of them, the longer ones, are placed in about this many rounds, each of documents within a tenth of the longest.
SHARE_IN_ROUNDS = 0.7
ROUNDS = 60
SIMILAR = 0.9

BIN = (1 << 32) - 1
"""The bits of a packed `free << 32 | bin`, or `free << 32 | documents`, that do not say how much is free."""


def _num_to_place_in_rounds(longest_first: np.ndarray) -> int:
    """How many of the longest documents are placed by whole arrays. None where few steps do all of them one by one."""
    num_documents = len(longest_first)
    num_lengths = 1 + np.count_nonzero(np.diff(longest_first))
    if num_documents <= FEW_DOCUMENTS or num_lengths * DOCUMENTS_PER_LENGTH <= num_documents:
        return 0
    return int(num_documents * SHARE_IN_ROUNDS)


def _pack_rounds(longest_first: np.ndarray, bins: _Bins) -> np.ndarray:
    """Best fit for many documents at once.

    A round takes the next documents, of similar length, shortest of them first, and gives each the fullest bin that holds it
    and that no document before it took. A bin with room for several of the longest stands there several times. What finds
    no bin opens new ones.

    Returns:
        int64, the bin of every document. `bins` is changed.
    """
    num_documents = len(longest_first)
    bin_of = np.empty(num_documents, dtype=np.int64)
    shortest_first = longest_first[::-1]
    rooms = np.zeros(0, np.int64)  # the open bins as free << 32 | bin, ascending
    start = 0
    while start < num_documents:
        longest = int(longest_first[start])
        first_other = num_documents - int(np.searchsorted(shortest_first, int(longest * SIMILAR)))
        stop = min(start + max(1, num_documents // ROUNDS), max(first_other, start + 1))
        lengths = longest_first[start:stop][::-1]
        size = stop - start

        some = int(np.searchsorted(rooms, int(lengths[0]) << 32))  # from here on bins hold some of the documents,
        every = int(np.searchsorted(rooms, longest << 32))  # and from here on every one
        many = np.minimum(
            (rooms[every : every + size] >> 32) // longest, bins.bin_size - bins.used[rooms[every : every + size] & BIN]
        )
        many = many[: int(np.searchsorted(np.cumsum(many), size)) + 1]
        places = np.concatenate([np.arange(some, every), np.repeat(np.arange(every, every + len(many)), many)])
        rank = np.arange(size)
        wanted = np.maximum.accumulate(np.searchsorted(rooms[some:every] >> 32, lengths) - rank) + rank
        found = places[wanted[wanted < len(places)]]

        left = size - len(found)
        per_bin = min(bins.capacity // longest, bins.bin_size)
        opened = bins.count + np.arange(left)[::-1] // per_bin
        bins.count += -(-left // per_bin)
        taken = np.concatenate([rooms[found] & BIN, opened])
        bin_of[start:stop] = taken[::-1]
        np.subtract.at(bins.free, taken, lengths)
        np.add.at(bins.used, taken, 1)

        touched = bins.are_open(np.unique(taken))
        changed = np.sort(bins.free[touched] << 32 | touched)
        rooms = np.delete(rooms, found)
        rooms = np.insert(rooms, np.searchsorted(rooms, changed), changed)
        start = stop
    return bin_of


def _pack_histogram(longest_first: np.ndarray, bins: _Bins) -> np.ndarray:
    """Best fit, length by length; see `_pack_rounds`.

    Bins with the same room and the same number of documents are alike: as many of them as there are documents for are filled in
    one step, each with as many documents as it holds.
    """
    capacity, bin_size, shortest, count = bins.capacity, bins.bin_size, bins.shortest, bins.count
    kinds: list[int] = []  # of open bins, as free << 32 | documents, ascending
    open_bins: dict[int, list[int]] = {}  # kind -> bins

    def keep(free: int, used: int, numbers: Sequence[int]) -> None:
        if free < shortest or used >= bin_size:
            return
        kind = free << 32 | used
        if kind in open_bins:
            open_bins[kind] += numbers
        else:
            open_bins[kind] = list(numbers)
            insort(kinds, kind)

    for number in bins.are_open(np.arange(count)).tolist():
        keep(int(bins.free[number]), int(bins.used[number]), (number,))
    filled: list[int] = []  # bins, and how many documents each got in that step
    amounts: list[int] = []
    values, counts = np.unique(longest_first, return_counts=True)
    for length, left in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            at = bisect_left(kinds, length << 32)
            is_new = at == len(kinds)
            free, used = (capacity, 0) if is_new else (kinds[at] >> 32, kinds[at] & BIN)
            many = min(free // length, bin_size - used, left)
            wanted = left // many
            if is_new:
                numbers: Sequence[int] = range(count, count + wanted)
                count += wanted
            else:
                alike = open_bins[kinds[at]]
                numbers = alike[-wanted:]
                del alike[-wanted:]
                if not alike:
                    del open_bins[kinds[at]], kinds[at]
            filled += numbers
            amounts += [many] * len(numbers)
            left -= many * len(numbers)
            keep(free - many * length, used + many, numbers)
    bins.count = count
    return np.repeat(np.array(filled, dtype=np.int64), np.array(amounts, dtype=np.int64))


def pack_next_fit(lengths: np.ndarray, capacity: int, bin_size: int) -> Plan:
    """Fill bins in the given order; a document that does not fit closes the bin. Slots stand in the order of `lengths`."""
    ends = np.cumsum(lengths)
    offsets, start, used = [0], 0, 0
    while start < len(lengths):
        stop = min(int(np.searchsorted(ends, used + capacity, side="right")), start + bin_size)
        offsets.append(stop)
        start, used = stop, int(ends[stop - 1])
    return Plan(np.asarray(lengths, dtype=np.int64), np.array(offsets, dtype=np.int64))


def join(plans: list[Plan]) -> Plan:
    """Plans one after the other."""
    starts = np.cumsum([0, *(len(plan.lengths) for plan in plans)])
    return Plan(
        lengths=np.concatenate([np.zeros(0, np.int64), *(plan.lengths for plan in plans)]),
        offsets=np.concatenate(
            [[0], *(plan.offsets[1:] + start for plan, start in zip(plans, starts, strict=False))]
        ).astype(np.int64),
    )


def deal(plan: Plan, order: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put documents into the slots of a plan.

    Documents of one length take its slots in the order given, and a bin stands where its first document stood: a shuffled
    order shuffles the bins, a curriculum stays a curriculum.

    Args:
        plan: bins as lengths; its lengths are those of `order`, in any order.
        order: int64 (num_slots,), document numbers.
        lengths: int64, the length of every document.

    Returns:
        `(documents, offsets)`: int64 document numbers bin after bin, and the (num_bins + 1,) borders between bins.
    """
    if not len(order):
        return order, plan.offsets
    place = np.empty(len(order), dtype=np.int64)  # slot -> place in `order`
    place[stable_order(plan.lengths)] = stable_order(lengths[order])
    sizes = np.diff(plan.offsets)
    rank = np.full(plan.num_bins, len(order), dtype=np.int64)
    filled = sizes > 0
    rank[filled] = place[plan.offsets[:-1][filled]]
    bins = stable_order(rank)
    sizes = sizes[bins]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    slots = np.repeat(plan.offsets[:-1][bins] - offsets[:-1], sizes) + np.arange(offsets[-1])
    return order[place[slots]], offsets


def stable_order(values: np.ndarray) -> np.ndarray:
    """As `np.argsort(values, kind="stable")`, for integers from 0 to 2**32. Two passes of the radix sort that numpy has for 16 bits."""
    low = (values & 0xFFFF).astype(np.uint16)
    order = np.argsort(low, kind="stable")
    if not len(values) or int(values.max()) <= 0xFFFF:
        return order
    return order[np.argsort((values >> 16).astype(np.uint16)[order], kind="stable")]
