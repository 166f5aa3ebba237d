"""Outputs that lack their low-rank term, and the residual that they are added to.

    sum = y + low b^T + residual

Added by a matmul and then by the compiler's own kernel, the two terms cost two passes over what is written here in one.
fp32 inside, rounded once.

Shape legend: N tokens, O features out, r rank (any, 0 for none).
"""

from __future__ import annotations

import torch

from axolotl.kernels.lora_factors import _load_factor, _padded
from axolotl.kernels.lora_glu import MAX_RANK, Tile, _grid
from axolotl.kernels.utils import jit, runs_triton, tl

# By the highest rank that they serve; they fit into the shared memory of smaller GPUs.
_WIDE = Tile(rows=32, columns=128, count=2, warps=4, stages=2)
_TILES = {64: _WIDE, MAX_RANK: _WIDE._replace(columns=64)}


@jit
def _sum_kernel(
    y_ptr, low_ptr, b_ptr, residual_ptr, out_ptr, low_out_ptr, num_rows, num_columns, y_stride, low_stride,
    RANK: tl.constexpr, PADDED: tl.constexpr, RESIDUAL: tl.constexpr, COPY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.trans(_load_factor(b_ptr, columns, num_columns, RANK, RANK, PADDED))
    row = tl.arange(0, ROWS)
    at_y = row[:, None] * y_stride + columns[None, :]
    at = row[:, None] * num_columns + columns[None, :]
    # From the last row up: the norm that follows begins with the first, and finds it in the cache.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * (TILES * ROWS)
    for start in tl.range(first, tl.minimum(first + TILES * ROWS, num_rows), ROWS, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        inside = ((start + row)[:, None] < num_rows) & (columns[None, :] < num_columns)
        wide = tl.cast(start, tl.int64)
        total = tl.load(y_ptr + wide * y_stride + at_y, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            total += tl.load(residual_ptr + wide * num_columns + at, mask=inside, other=0.0).to(tl.float32)
        if RANK > 0:
            low = _load_factor(low_ptr + wide * low_stride, row, num_rows - start, low_stride, RANK, PADDED)
            total = tl.dot(low, b, total)
            if COPY and tl.program_id(0) == 0:
                rank = tl.arange(0, PADDED)[None, :]
                is_low = ((start + row)[:, None] < num_rows) & (rank < RANK)
                tl.store(low_out_ptr + wide * RANK + row[:, None] * RANK + rank, low, mask=is_low)
        tl.store(out_ptr + wide * num_columns + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def _fits(y: torch.Tensor, low: torch.Tensor, b: torch.Tensor, residual: torch.Tensor | None) -> bool:
    flat = [b] if residual is None else [b, residual]
    tensors = (y, low, *flat)
    half = y.dtype in (torch.float16, torch.bfloat16) and all(tensor.dtype == y.dtype for tensor in tensors)
    rows = all(tensor.is_cuda and tensor.stride(1) == 1 for tensor in (y, low))
    return half and rows and b.shape[1] <= MAX_RANK and runs_triton(*flat)


def add_low_rank(
    y: torch.Tensor,
    low: torch.Tensor,
    b: torch.Tensor,
    residual: torch.Tensor | None = None,
    low_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y + low b^T`, and `residual` if it is given.

    Args:
        y: (N, O), whose rows may be any number of elements apart.
        low: (N, r), the same.
        b: (O, r), scaled.
        residual: (N, O).
        low_out: (N, r) contiguous, or None: becomes a copy of `low`.

    Returns:
        (N, O), contiguous, in the dtype of `y`. On CUDA without the kernel, the sum of the first two is rounded too.
    """
    num_rows, size, rank = *y.shape, b.shape[1]
    if not _fits(y, low, b, residual):
        if low_out is not None:
            low_out.copy_(low)
        # Wider on a CPU; on CUDA for the ranks above those of the kernel, whose matmul takes longer than the sum.
        wide = y.dtype if y.is_cuda else torch.promote_types(y.dtype, torch.float32)
        whole = torch.addmm(y.to(wide), low.to(wide), b.to(wide).t())
        return (whole if residual is None else whole + residual).to(y.dtype)
    out = y.new_empty(num_rows, size)
    tile = next(tile for highest, tile in _TILES.items() if rank <= highest)
    if out.numel():
        with torch.cuda.device(y.device):
            _sum_kernel[_grid(num_rows, size, tile)](
                y, low, b, out if residual is None else residual, out, out if low_out is None else low_out,
                num_rows, size, y.stride(0), low.stride(0),
                RANK=rank, PADDED=_padded(rank), RESIDUAL=residual is not None, COPY=low_out is not None,
                ROWS=tile.rows, COLUMNS=tile.columns, TILES=tile.count, STAGES=tile.stages, num_warps=tile.warps,
            )  # fmt: skip
    return out
