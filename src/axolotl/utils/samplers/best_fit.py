"""Bin packing on the length histogram.

Best-fit decreasing (Johnson 1974; 11/9 OPT + 6/9 bins at worst) looks only at lengths, so documents of equal length are
interchangeable: it is run on the histogram, moving whole groups of identical bins at once. The cost grows with the number
of distinct lengths, not with the number of documents. The result is a `Plan`, bins of lengths; which document takes which
slot is decided per epoch (`deal`).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
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
    values, counts = np.unique(lengths, return_counts=True)
    best = _expand(_pack_histogram(values.tolist(), counts.tolist(), capacity, bin_size))
    if not len(lengths) or int(np.diff(best.offsets).max()) < bin_size:
        return best
    # Short documents come last, so some bins reached `bin_size` half empty: an even mix may need fewer.
    return pack_even(lengths, capacity, bin_size, best.num_bins) or best


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
            offsets = np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=num_bins))])
            return Plan(longest_first[np.argsort(bin_of, kind="stable")], offsets)
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


def _pack_histogram(
    values: list[int], counts: list[int], capacity: int, bin_size: int
) -> list[tuple[int, list[tuple[int, int]]]]:
    """Groups of identical bins: (number of bins, [(length, how many), ...])."""
    if not values:
        return []
    shortest = values[0]
    # A pattern is a node of a tree: (parent pattern, length, how many); 0 is the empty bin.
    patterns: list[tuple[int, int, int]] = [(0, 0, 0)]
    done: list[tuple[int, int]] = []  # (bins, pattern)
    room: list[int] = []  # distinct amounts of free room, ascending
    open_bins: dict[int, list[tuple[int, int, int]]] = {}  # free room -> [(bins, documents in each, pattern)]

    def put(bins: int, free: int, used: int, parent: int, length: int, many: int) -> None:
        """`bins` bins of `parent` with `many` more documents of `length`."""
        patterns.append((parent, length, many))
        keep(bins, free - many * length, used + many, len(patterns) - 1)

    def keep(bins: int, free: int, used: int, pattern: int) -> None:
        if free < shortest or used >= bin_size:
            done.append((bins, pattern))
        elif free in open_bins:
            open_bins[free].append((bins, used, pattern))
        else:
            open_bins[free] = [(bins, used, pattern)]
            insort(room, free)

    for length, left in zip(reversed(values), reversed(counts), strict=True):
        while left:
            at = bisect_left(room, length)
            if at == len(room):
                many = min(capacity // length, bin_size)
                full, rest = divmod(left, many)
                if full:
                    put(full, capacity, 0, 0, length, many)
                if rest:
                    put(1, capacity, 0, 0, length, rest)
                break
            free = room[at]
            bins, used, pattern = open_bins[free].pop()
            if not open_bins[free]:
                del open_bins[free], room[at]
            many = min(free // length, bin_size - used)
            full = min(bins, left // many)
            if full:
                put(full, free, used, pattern, length, many)
                left -= full * many
                bins -= full
            if bins and left:  # fewer than `many` documents are left for the next bin of this group
                put(1, free, used, pattern, length, left)
                left = 0
                bins -= 1
            if bins:
                keep(bins, free, used, pattern)

    done += [(bins, pattern) for groups in open_bins.values() for bins, _, pattern in groups]
    return [(bins, _pieces(patterns, pattern)) for bins, pattern in done]


def _pieces(patterns: list[tuple[int, int, int]], pattern: int) -> list[tuple[int, int]]:
    pieces = []
    while pattern:
        pattern, length, many = patterns[pattern]
        pieces.append((length, many))
    return pieces[::-1]


def _expand(groups: list[tuple[int, list[tuple[int, int]]]]) -> Plan:
    """Write each group out as its bins, without a Python loop over bins."""
    if not groups:
        return Plan(np.zeros(0, np.int64), np.zeros(1, np.int64))
    pieces = np.array([piece for _, group in groups for piece in group], dtype=np.int64)
    num_pieces = np.array([len(group) for _, group in groups], dtype=np.int64)
    group_of_bin = np.repeat(np.arange(len(groups)), [bins for bins, _ in groups])
    first_piece = np.cumsum(num_pieces) - num_pieces
    per_bin = num_pieces[group_of_bin]
    piece_ends = np.cumsum(per_bin)
    piece = np.repeat(first_piece[group_of_bin] - (piece_ends - per_bin), per_bin) + np.arange(piece_ends[-1])
    slots_up_to_piece = np.concatenate([[0], np.cumsum(pieces[piece, 1])])
    return Plan(
        lengths=np.repeat(pieces[piece, 0], pieces[piece, 1]),
        offsets=slots_up_to_piece[np.concatenate([[0], piece_ends])],
    )


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


def split_to_multiple(plan: Plan, multiple: int) -> Plan:
    """Raise the number of bins to a multiple of `multiple`, so that every rank gets as many, without repeating a document.

    The bins with most documents are cut in two. When only bins of one document are left, empty bins fill up.
    """
    missing = -plan.num_bins % multiple
    if not missing:
        return plan
    sizes = np.diff(plan.offsets)
    largest = np.argsort(-sizes, kind="stable")[:missing]
    heap = [(-int(sizes[b]), int(plan.offsets[b])) for b in largest]
    heapq.heapify(heap)
    cuts = []
    for _ in range(missing):
        if not heap or heap[0][0] > -2:
            cuts.append(len(plan.lengths))
            continue
        size, start = heapq.heappop(heap)
        half = -size // 2
        cuts.append(start + half)
        heapq.heappush(heap, (-half, start))
        heapq.heappush(heap, (size + half, start + half))
    return Plan(plan.lengths, np.sort(np.concatenate([plan.offsets, np.array(cuts, dtype=np.int64)])))


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
    place[np.argsort(plan.lengths, kind="stable")] = np.argsort(lengths[order], kind="stable")
    sizes = np.diff(plan.offsets)
    rank = np.full(plan.num_bins, len(order), dtype=np.int64)
    filled = sizes > 0
    rank[filled] = place[plan.offsets[:-1][filled]]
    bins = np.argsort(rank, kind="stable")
    sizes = sizes[bins]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    slots = np.repeat(plan.offsets[:-1][bins] - offsets[:-1], sizes) + np.arange(offsets[-1])
    return order[place[slots]], offsets
