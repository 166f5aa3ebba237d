"""Gradients of a low-rank product from one read of the gradient of its output.

    y = ... + low B^T:   grad_low = grad B,   grad_B = grad^T low

As two matmuls, each of these reads all of `grad` for a few products an element, which takes most of its time. Here a program
takes a block of rows and columns through shared memory once, for both. What the programs found is then summed in a fixed
order, so that the same inputs give the same bits. fp32 inside, rounded once.

Shape legend: N tokens, O output features, r rank of a block, R columns of B.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from axolotl.kernels.utils import BLOCK, jit, num_programs, runs_triton, tl


class FactorTile(NamedTuple):
    """How the kernel cuts the gradient.

    Attributes:
        rows: of one tile.
        columns: of one tile, and of the block of a program.
        programs: into which all is cut, about: a program does one tile below the other.
        warps: of a program.
        stages: tiles that are loaded at a time, all but one of them ahead.
    """

    rows: int
    columns: int
    programs: int
    warps: int
    stages: int


# By the highest rank that they serve. The wider a block, the fewer sums for grad_low; the longer, the fewer for grad_B.
TILES = {
    16: FactorTile(rows=32, columns=256, programs=256, warps=4, stages=4),
    32: FactorTile(rows=32, columns=256, programs=256, warps=4, stages=3),
}
"""Above the highest rank, the partial sums are about as large as the gradient, and plain matmuls do the work."""

_SUMMED_PARTS = 4
_SUMMED_ELEMENTS = 512


@jit
def _load_factor(ptr, at, num, stride, RANK: tl.constexpr, PADDED: tl.constexpr):
    """Rows `at` of a low-rank factor (num, RANK) with row stride `stride`, filled up with zeros: (len(at), PADDED)."""
    rank = tl.arange(0, PADDED)
    return tl.load(
        ptr + at[:, None] * stride + rank[None, :], mask=(at[:, None] < num) & (rank[None, :] < RANK), other=0.0
    )


@jit
def _sum_parts(sums_ptr, at, size, first, stop, PARTS: tl.constexpr):
    """Of the elements `at` of `size`, the sums over the parts from `first` up to `stop`."""
    part = tl.arange(0, PARTS)[:, None]
    total = tl.zeros(at.shape, tl.float32)
    for start in range(first, stop, PARTS):
        parts = start + part
        inside = (parts < stop) & (at[None, :] < size)
        total += tl.sum(tl.load(sums_ptr + parts.to(tl.int64) * size + at[None, :], mask=inside, other=0.0), 0)
    return total


@jit
def _pick(values, index):
    """`values[index]`, 0 for any other index."""
    picked = index * 0
    for at in tl.static_range(len(values)):
        picked = tl.where(index == at, values[at], picked)
    return picked


@jit
def _find(starts, at):
    """Index of the last start that is not above `at`."""
    index = at * 0
    for later in tl.static_range(1, len(starts)):
        index += (at >= starts[later]).to(tl.int32)
    return index


@jit
def _part_kernel(
    grad_ptr, b_ptr, low_ptr, low_sums_ptr, b_sums_ptr, num_rows, num_columns, stride_grad, stride_b, stride_low, num_tiles,
    FIRSTS: tl.constexpr, STARTS: tl.constexpr, STOPS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes grad_low of the rows and columns of this program, and grad_B."""
    program = tl.program_id(0)
    index = _find(FIRSTS, program)
    columns = _pick(STARTS, index) + (program - _pick(FIRSTS, index)) * COLUMNS + tl.arange(0, COLUMNS)
    stop = _pick(STOPS, index)
    b = _load_factor(b_ptr + index * RANK, columns, stop, stride_b, RANK, PADDED)
    sum_b = tl.zeros((COLUMNS, PADDED), tl.float32)
    row = tl.arange(0, ROWS)
    rank = tl.arange(0, PADDED)
    at_grad = row[:, None] * stride_grad + columns[None, :]
    at_low = row[:, None] * RANK + rank[None, :]
    low_ptr += index * RANK
    low_sums_ptr += program.to(tl.int64) * num_rows * RANK
    first = tl.program_id(1) * (num_tiles * ROWS)
    for start in tl.range(first, tl.minimum(first + num_tiles * ROWS, num_rows), ROWS, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        before = tl.cast(start, tl.int64)
        left = num_rows - start
        # Both products take the tile from shared memory as it was loaded; `low^T grad` would need another layout of it.
        inside = (row[:, None] < left) & (columns[None, :] < stop)
        grad = tl.load(grad_ptr + before * stride_grad + at_grad, mask=inside, other=0.0)
        low = _load_factor(low_ptr + before * stride_low, row, left, stride_low, RANK, PADDED)
        grad_low = tl.dot(grad, b)
        sum_b = tl.dot(tl.trans(grad), low, sum_b)
        tl.store(low_sums_ptr + before * RANK + at_low, grad_low, mask=(row[:, None] < left) & (rank[None, :] < RANK))
    b_sums_ptr += tl.program_id(1).to(tl.int64) * num_columns * RANK
    inside = (columns[:, None] < stop) & (rank[None, :] < RANK)
    tl.store(b_sums_ptr + columns[:, None] * RANK + rank[None, :], sum_b, mask=inside)


@jit
def _finish_kernel(
    low_sums_ptr, b_sums_ptr, grad_low_ptr, grad_b_ptr, num_rows, num_columns, num_parts, stride_low, width, num_low,
    FIRSTS: tl.constexpr, LASTS: tl.constexpr, STARTS: tl.constexpr, RANK: tl.constexpr,
    PARTS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """`num_low` programs for each block write its columns of grad_low, those that follow write the blocks of grad_B."""
    index = tl.program_id(0) // num_low
    if index < len(FIRSTS):
        at = tl.program_id(0) % num_low * ELEMENTS + tl.arange(0, ELEMENTS)
        size = num_rows * RANK
        total = _sum_parts(low_sums_ptr, at, size, _pick(FIRSTS, index), _pick(LASTS, index), PARTS)
        to = grad_low_ptr + (at // RANK).to(tl.int64) * stride_low + index * RANK + at % RANK
        tl.store(to, total.to(grad_low_ptr.dtype.element_ty), mask=at < size)
    else:
        at = (tl.program_id(0) - len(FIRSTS) * num_low) * ELEMENTS + tl.arange(0, ELEMENTS)
        size = num_columns * RANK
        total = _sum_parts(b_sums_ptr, at, size, 0, num_parts, PARTS)
        row = at // RANK
        indices = _find(STARTS, row)
        to = grad_b_ptr + row * width + indices * RANK + at % RANK
        tl.store(to, total.to(grad_b_ptr.dtype.element_ty), mask=at < size)


@jit
def _sum_kernel(
    sums_ptr, first_ptr, second_ptr, third_ptr, num_parts, size_first, size_second, size_third,
    PARTS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Sums of the rows of (num_parts, size_first + size_second + size_third), in three pieces."""
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    total = _sum_parts(sums_ptr, at, size_first + size_second + size_third, 0, num_parts, PARTS)
    total = total.to(first_ptr.dtype.element_ty)
    tl.store(first_ptr + at, total, mask=at < size_first)
    at -= size_first
    tl.store(second_ptr + at, total, mask=(at >= 0) & (at < size_second))
    at -= size_second
    tl.store(third_ptr + at, total, mask=(at >= 0) & (at < size_third))


@jit
def _scale_kernel(in_ptr, scale_ptr, out_ptr, size, stride, COLUMNS: tl.constexpr, ELEMENTS: tl.constexpr):
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    row = at // COLUMNS
    value = tl.load(in_ptr + row.to(tl.int64) * stride + at % COLUMNS, mask=at < size, other=0.0).to(tl.float32)
    value *= tl.load(scale_ptr + row, mask=at < size, other=0.0)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=at < size)


def _padded(rank: int) -> int:
    """Matrix units take at least 16 products; ranges have powers of two."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 16


def scale_rows(low: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`low * scale` in the dtype of `low`, rounded once.

    Args:
        low: (N, R). Rows may lie apart.
        scale: (N, 1) fp32.

    Returns:
        (N, R), contiguous.
    """
    out = torch.empty_like(low, memory_format=torch.contiguous_format)
    if not (low.is_cuda and low.numel() and low.stride(1) == 1 and low.dtype != torch.float64 and runs_triton(scale)):
        return torch.mul(low, scale, out=out)
    with torch.cuda.device(low.device):
        _scale_kernel[num_programs(low.numel())](
            low, scale, out, low.numel(), low.stride(0), COLUMNS=low.shape[1], ELEMENTS=BLOCK
        )
    return out


def sum_rows(sums: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
    """Write the sums over the first axis to three tensors.

    Args:
        sums: (parts, size) fp32 on CUDA, contiguous.
        pieces: three contiguous tensors of one dtype, `size` elements together; changed in place.
    """
    if sums.shape[1]:
        with torch.cuda.device(sums.device):
            _sum_kernel[(-(-sums.shape[1] // _SUMMED_ELEMENTS),)](
                sums, *pieces, sums.shape[0], *(piece.numel() for piece in pieces),
                PARTS=_SUMMED_PARTS, ELEMENTS=_SUMMED_ELEMENTS,
            )  # fmt: skip


def factor_gradients(
    grad: torch.Tensor,
    b: torch.Tensor,
    low: torch.Tensor,
    grad_low: torch.Tensor | None = None,
    blocks: Sequence[tuple[int, int]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of both factors of `low b^T`.

    Args:
        grad: (N, O), of the product. Rows may lie apart.
        b: (O, R) contiguous.
        low: (N, R). Rows may lie apart.
        grad_low: (N, R), where to write its gradient. Rows may lie apart.
        blocks: height and rank of the blocks along the diagonal of b, O high together, if all else is zeros. Of one rank, they
            cost no more than a b of that rank.

    Returns:
        `(grad_low (N, R), grad_b (O, R))`, in the dtype of `grad`. Of grad_b, what is not in a block has any value.
    """
    if grad_low is None:
        grad_low = grad.new_empty(grad.shape[0], b.shape[1])
    heights, ranks = zip(*(blocks or [b.shape]), strict=True)
    if len(set(ranks)) > 1:
        heights, ranks = (b.shape[0],), (b.shape[1],)
    if not _fits(grad, b, low, grad_low, rank=ranks[0]):
        torch.mm(grad, b, out=grad_low)
        return grad_low, grad.t() @ low
    return grad_low, _launch(grad, b, low, grad_low, heights, ranks[0])


def _fits(*tensors: torch.Tensor, rank: int) -> bool:
    half = all(tensor.dtype in (torch.float16, torch.bfloat16) and tensor.numel() for tensor in tensors)
    rows = all(tensor.stride(1) == 1 for tensor in tensors)
    return half and rows and 0 < rank <= max(TILES) and runs_triton(tensors[1])


def _launch(
    grad: torch.Tensor, b: torch.Tensor, low: torch.Tensor, grad_low: torch.Tensor, heights: Sequence[int], rank: int
) -> torch.Tensor:
    """Write grad_low and return grad_b, for a b of blocks `heights` by `rank`."""
    (num_rows, num_columns), width = grad.shape, b.shape[1]
    tile = next(tile for highest, tile in TILES.items() if rank <= highest)
    stops = tuple(accumulate(heights))
    lasts = tuple(accumulate(-(-height // tile.columns) for height in heights))
    cut = {"FIRSTS": (0, *lasts[:-1]), "STARTS": (0, *stops[:-1]), "RANK": rank}
    num_tiles = -(-num_rows // (tile.rows * max(1, tile.programs // lasts[-1])))
    grid = (lasts[-1], -(-num_rows // (tile.rows * num_tiles)))
    low_sums = torch.empty(grid[0], num_rows, rank, dtype=torch.float32, device=grad.device)
    b_sums = torch.empty(grid[1], num_columns, rank, dtype=torch.float32, device=grad.device)
    grad_b = torch.empty_like(b) if width == rank else torch.zeros_like(b)
    grad_low[:, rank * len(heights) :].zero_()
    num_low, num_b = (-(-count * rank // _SUMMED_ELEMENTS) for count in (num_rows, num_columns))
    with torch.cuda.device(grad.device):
        _part_kernel[grid](
            grad, b, low, low_sums, b_sums, num_rows, num_columns, grad.stride(0), width, low.stride(0), num_tiles,
            **cut, STOPS=stops, PADDED=_padded(rank), ROWS=tile.rows, COLUMNS=tile.columns, STAGES=tile.stages,
            num_warps=tile.warps,
        )  # fmt: skip
        _finish_kernel[(num_low * len(heights) + num_b,)](
            low_sums, b_sums, grad_low, grad_b, num_rows, num_columns, grid[1], grad_low.stride(0), width, num_low,
            **cut, LASTS=lasts, PARTS=_SUMMED_PARTS, ELEMENTS=_SUMMED_ELEMENTS,
        )  # fmt: skip
    return grad_b
