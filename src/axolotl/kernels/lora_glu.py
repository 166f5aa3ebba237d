"""Gated activations whose inputs still lack their low-rank terms.

    gate = y_gate + low_gate B_gate^T,   up = y_up + low_up B_up^T,   h = act(gate) * up

Added by separate matmuls, the low-rank terms cost one pass over gate and one over up each, forward and backward. Here they
are formed in registers while the activation reads its inputs: the products of a tile are (rows, rank) by (rank, columns).
Backward forms the low-rank term of its incoming gradient in the same way, and from the values that it has in registers the
gradients of the factors beside it, which would otherwise take one more pass over each of its outputs and one over h.
fp32 inside, rounded once.

Shape legend: N tokens, I features of gate and of up, r rank (any, 0 for none; each may differ), R both ranks, rounded up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from axolotl.kernels.glu import Activation, _act_and_slope, gated_backward, gated_forward
from axolotl.kernels.lora_factors import _load_factor, _padded, factor_gradients, sum_rows
from axolotl.kernels.utils import jit, runs_triton, tl

MAX_RANK = 128
"""Above, a tile of B does not fit beside the tiles of the activations, and plain matmuls do the work."""

MAX_SUMMED_RANK = 16
"""Above, the sums over tokens do not fit in the registers beside a tile; matmuls read the outputs of backward again."""

MAX_BACK_RANK = 32
"""Above, every program reads as much of B as of its gradient, and matmuls multiply the gradients by B."""


class Tile(NamedTuple):
    """How a kernel cuts its matrices.

    Attributes:
        rows: of one tile.
        columns: of one tile.
        count: tiles that a program does, one below the other.
        warps: of a program.
        stages: tiles that are loaded at a time, all but one of them ahead.
    """

    rows: int
    columns: int
    count: int
    warps: int
    stages: int


# By the highest rank that they serve: the fastest on an H200 at rank 16, and what fits into the shared memory of smaller GPUs.
# Several tiles read their part of the B matrices once; what a program sums goes to memory once for all its tiles.
_WIDE = Tile(rows=16, columns=128, count=16, warps=4, stages=3)
_PLAIN_TILES = {32: _WIDE, 64: _WIDE._replace(columns=64, stages=2), MAX_RANK: _WIDE._replace(columns=32, stages=2)}
_SUMMING_TILE = Tile(rows=32, columns=64, count=32, warps=4, stages=3)
_BACK_TILES = [Tile(rows=rows, columns=128, count=1, warps=4, stages=3) for rows in (64, 32, 16)]
"""The first that makes `_BACK_PROGRAMS` or more, else the last."""
_BACK_PROGRAMS = 256
SUMMED_ROWS = _SUMMING_TILE.rows * _SUMMING_TILE.count
"""Tokens of one program of the summing kernel, which writes one fp32 sum for each element of the factors."""


# Products with a low-rank factor are added to the accumulator of the matrix unit, so that the tiles are loaded in its layout,
# and by `tl.range` ahead of their use. A factor that is also multiplied the other way round is loaded twice, as a tile that
# has to change its layout cannot be loaded ahead.


@jit
def _load_factor_T(ptr, at, num, stride, RANK: tl.constexpr, PADDED: tl.constexpr):
    """The transpose of `_load_factor`: (PADDED, len(at))."""
    rank = tl.arange(0, PADDED)
    return tl.load(
        ptr + at[None, :] * stride + rank[:, None], mask=(at[None, :] < num) & (rank[:, None] < RANK), other=0.0
    )


@jit
def _store_sum(ptr, value, at, num, stride, stride_rank, RANK: tl.constexpr, PADDED: tl.constexpr):
    """Write `value` (PADDED, len(at)) to the places `at` of `num`."""
    rank = tl.arange(0, PADDED)
    mask = (at[None, :] < num) & (rank[:, None] < RANK)
    tl.store(ptr + at[None, :] * stride + rank[:, None] * stride_rank, value, mask=mask)


@jit
def _forward_kernel(
    gul_ptr, h_ptr, b_gate_ptr, b_up_ptr, num_rows, num_columns, width,
    RANK_GATE: tl.constexpr, PADDED_GATE: tl.constexpr, RANK_UP: tl.constexpr, PADDED_UP: tl.constexpr,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    low_ptr = gul_ptr + 2 * num_columns
    b_gate = tl.trans(_load_factor(b_gate_ptr, columns, num_columns, RANK_GATE, RANK_GATE, PADDED_GATE))
    b_up = tl.trans(_load_factor(b_up_ptr, columns, num_columns, RANK_UP, RANK_UP, PADDED_UP))
    row = tl.arange(0, ROWS)
    at = row[:, None] * width + columns[None, :]
    at_h = row[:, None] * num_columns + columns[None, :]
    first = tl.program_id(1) * (TILES * ROWS)
    for start in tl.range(first, tl.minimum(first + TILES * ROWS, num_rows), ROWS, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        before, left = tl.cast(start, tl.int64), num_rows - start
        inside = (row[:, None] < left) & (columns[None, :] < num_columns)
        tile_ptr = gul_ptr + before * width
        tile_low_ptr = low_ptr + before * width
        gate = tl.load(tile_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(tile_ptr + num_columns + at, mask=inside, other=0.0).to(tl.float32)
        if RANK_GATE > 0:
            gate = tl.dot(_load_factor(tile_low_ptr, row, left, width, RANK_GATE, PADDED_GATE), b_gate, gate)
        if RANK_UP > 0:
            up = tl.dot(_load_factor(tile_low_ptr + RANK_GATE, row, left, width, RANK_UP, PADDED_UP), b_up, up)
        act, _ = _act_and_slope(gate, ACT)
        tl.store(h_ptr + before * num_columns + at_h, (act * up).to(h_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    grad_ptr, gul_ptr, grad_gul_ptr, b_gate_ptr, b_up_ptr, grad_low_ptr, a_ptr, sums_ptr,
    num_rows, num_columns, width,
    RANK_GATE: tl.constexpr, PADDED_GATE: tl.constexpr, RANK_UP: tl.constexpr, PADDED_UP: tl.constexpr,
    RANK_DOWN: tl.constexpr, PADDED_DOWN: tl.constexpr, SUMS: tl.constexpr, WRITE_H: tl.constexpr,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With SUMS, a row of `sums_ptr` gets the gradients of B_gate, B_up and A from the tokens of this program; with WRITE_H,
    `grad_ptr` gets h."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    low_ptr = gul_ptr + 2 * num_columns
    b_gate = tl.trans(_load_factor(b_gate_ptr, columns, num_columns, RANK_GATE, RANK_GATE, PADDED_GATE))
    b_up = tl.trans(_load_factor(b_up_ptr, columns, num_columns, RANK_UP, RANK_UP, PADDED_UP))
    rank = tl.arange(0, PADDED_DOWN)[:, None]
    is_a = (rank < RANK_DOWN) & (columns[None, :] < num_columns)
    a = tl.load(a_ptr + rank * num_columns + columns[None, :], mask=is_a, other=0.0)
    sum_gate = tl.zeros((PADDED_GATE, COLUMNS), tl.float32)
    sum_up = tl.zeros((PADDED_UP, COLUMNS), tl.float32)
    sum_down = tl.zeros((PADDED_DOWN, COLUMNS), tl.float32)
    dtype = grad_gul_ptr.dtype.element_ty
    row = tl.arange(0, ROWS)
    at = row[:, None] * width + columns[None, :]
    at_h = row[:, None] * num_columns + columns[None, :]
    first = tl.program_id(1) * (TILES * ROWS)
    # Counted by tiles, the loop takes ten registers less a thread than by rows: one more program fits beside the others.
    for tile in tl.range(0, tl.cdiv(tl.minimum(TILES * ROWS, num_rows - first), ROWS), num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        start = first + tile * ROWS
        before, left = tl.cast(start, tl.int64), num_rows - start
        inside = (row[:, None] < left) & (columns[None, :] < num_columns)
        tile_ptr = gul_ptr + before * width
        tile_low_ptr = low_ptr + before * width
        tile_grad_low_ptr = grad_low_ptr + before * RANK_DOWN
        gate = tl.load(tile_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(tile_ptr + num_columns + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + before * num_columns + at_h, mask=inside, other=0.0).to(tl.float32)
        if RANK_GATE > 0:
            gate = tl.dot(_load_factor(tile_low_ptr, row, left, width, RANK_GATE, PADDED_GATE), b_gate, gate)
        if RANK_UP > 0:
            up = tl.dot(_load_factor(tile_low_ptr + RANK_GATE, row, left, width, RANK_UP, PADDED_UP), b_up, up)
        if RANK_DOWN > 0:
            grad_low = _load_factor(tile_grad_low_ptr, row, left, RANK_DOWN, RANK_DOWN, PADDED_DOWN)
            grad = tl.dot(grad_low, a, grad)
        act, slope = _act_and_slope(gate, ACT)
        h = (act * up).to(dtype)
        grad_gate = (grad * up * slope).to(dtype)
        grad_up = (grad * act).to(dtype)
        tile_ptr = grad_gul_ptr + before * width
        tl.store(tile_ptr + at, grad_gate, mask=inside)
        tl.store(tile_ptr + num_columns + at, grad_up, mask=inside)
        if WRITE_H:
            tl.store(grad_ptr + before * num_columns + at_h, h, mask=inside)
        if SUMS and RANK_GATE > 0:
            low_T = _load_factor_T(tile_low_ptr, row, left, width, RANK_GATE, PADDED_GATE)
            sum_gate = tl.dot(low_T, grad_gate, sum_gate)
        if SUMS and RANK_UP > 0:
            low_T = _load_factor_T(tile_low_ptr + RANK_GATE, row, left, width, RANK_UP, PADDED_UP)
            sum_up = tl.dot(low_T, grad_up, sum_up)
        if SUMS and RANK_DOWN > 0:
            grad_low_T = _load_factor_T(tile_grad_low_ptr, row, left, RANK_DOWN, RANK_DOWN, PADDED_DOWN)
            sum_down = tl.dot(grad_low_T, h, sum_down)
    if SUMS:
        to = sums_ptr + tl.program_id(1).to(tl.int64) * num_columns * (RANK_GATE + RANK_UP + RANK_DOWN)
        _store_sum(to, sum_gate, columns, num_columns, RANK_GATE, 1, RANK_GATE, PADDED_GATE)
        to += num_columns * RANK_GATE
        _store_sum(to, sum_up, columns, num_columns, RANK_UP, 1, RANK_UP, PADDED_UP)
        to += num_columns * RANK_UP
        _store_sum(to, sum_down, columns, num_columns, 1, num_columns, RANK_DOWN, PADDED_DOWN)


@jit
def _back_kernel(
    grad_gul_ptr, b_gate_ptr, b_up_ptr, num_rows, num_columns, width,
    RANK_GATE: tl.constexpr, RANK_UP: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Half of the programs multiply rows of the gradient of gate by B_gate, half those of up by B_up."""
    is_up = tl.program_id(1) == 1
    b_ptr = tl.where(is_up, b_up_ptr, b_gate_ptr)
    rank = tl.where(is_up, RANK_UP, RANK_GATE)
    start = tl.program_id(0) * ROWS
    left = num_rows - start
    row, column, low = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    grad_gul_ptr += start.to(tl.int64) * width
    grad_ptr = grad_gul_ptr + tl.where(is_up, num_columns, 0)
    at = row[:, None] * width + column[None, :]
    at_b = column[:, None] * rank + low[None, :]
    total = tl.zeros((ROWS, PADDED), tl.float32)
    for first in tl.range(0, tl.where(rank > 0, num_columns, 0), COLUMNS, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        more = num_columns - first
        grad = tl.load(grad_ptr + first + at, mask=(row[:, None] < left) & (column[None, :] < more), other=0.0)
        b = tl.load(b_ptr + first * rank + at_b, mask=(column[:, None] < more) & (low[None, :] < rank), other=0.0)
        total = tl.dot(grad, b, total)
    to = grad_gul_ptr + 2 * num_columns + tl.where(is_up, RANK_GATE, 0) + row[:, None] * width + low[None, :]
    tl.store(to, total.to(grad_gul_ptr.dtype.element_ty), mask=(row[:, None] < left) & (low[None, :] < rank))


def _fits(*tensors: torch.Tensor, ranks: tuple[int, ...]) -> bool:
    half = all(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    return half and max(ranks) <= MAX_RANK and runs_triton(*tensors)


def _plain_tile(*ranks: int) -> Tile:
    return next(tile for highest, tile in _PLAIN_TILES.items() if max(ranks) <= highest)


def _grid(num_rows: int, num_columns: int, tile: Tile) -> tuple[int, int]:
    return (-(-num_columns // tile.columns), -(-num_rows // (tile.rows * tile.count)))


def _back_tile(num_rows: int) -> Tile:
    return next((tile for tile in _BACK_TILES if 2 * num_rows >= _BACK_PROGRAMS * tile.rows), _BACK_TILES[-1])


def _cut(act: Activation, tile: Tile, **ranks: int) -> dict[str, Any]:
    """The constants of a kernel: of every rank, itself and what it is padded to, and the tile."""
    padded = {f"PADDED_{name}": _padded(rank) for name, rank in ranks.items()}
    own = {f"RANK_{name}": rank for name, rank in ranks.items()}
    cut = {"ROWS": tile.rows, "COLUMNS": tile.columns, "TILES": tile.count, "STAGES": tile.stages}
    return {**own, **padded, **cut, "ACT": act, "num_warps": tile.warps}


def _add_low_rank(gul: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two inputs of the activation, (N, I) contiguous each."""
    gate, up, low_gate, low_up, _ = gul.split(_columns(gul, b_gate, b_up), dim=1)
    gate = torch.addmm(gate, low_gate, b_gate.t()) if b_gate.shape[1] else gate.contiguous()
    return gate, torch.addmm(up, low_up, b_up.t()) if b_up.shape[1] else up.contiguous()


def _columns(gul: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor) -> list[int]:
    """How many columns of `gul` belong to gate, up, the low-rank input of each, and to nothing."""
    size, ranks = b_gate.shape[0], (b_gate.shape[1], b_up.shape[1])
    return [size, size, *ranks, gul.shape[1] - 2 * size - sum(ranks)]


def lora_gated_forward(gul: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor, act: Activation) -> torch.Tensor:
    """`act(gate) * up`.

    Args:
        gul: (N, 2 I + R) contiguous: gate and up without their low-rank terms, then `x A^T` of both, side by side. What is left
            of the R columns is not read.
        b_gate: (I, r_gate), scaled; b_up: (I, r_up).
        act: the activation.

    Returns:
        (N, I) in the dtype of `gul`.
    """
    num_rows, size = gul.shape[0], b_gate.shape[0]
    ranks = (b_gate.shape[1], b_up.shape[1])
    if not _fits(gul, b_gate, b_up, ranks=ranks):
        return gated_forward(*_add_low_rank(gul, b_gate, b_up), act)
    h = gul.new_empty(num_rows, size)
    tile = _plain_tile(*ranks)
    if num_rows:
        with torch.cuda.device(gul.device):
            _forward_kernel[_grid(num_rows, size, tile)](
                gul, h, b_gate, b_up, num_rows, size, gul.shape[1], **_cut(act, tile, GATE=ranks[0], UP=ranks[1])
            )
    return h


class GatedGradients(NamedTuple):
    """What `lora_gated_backward` returns.

    Attributes:
        gul: (N, 2 I + R), of gate, of up and of their low-rank inputs, side by side, then zeros.
        b_gate: (I, r_gate).
        b_up: (I, r_up).
        a: (r, I), of the A of the projection that follows.
    """

    gul: torch.Tensor
    b_gate: torch.Tensor
    b_up: torch.Tensor
    a: torch.Tensor


def lora_gated_backward(
    grad_h: torch.Tensor,
    gul: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
    grad_low: torch.Tensor,
    a: torch.Tensor,
    act: Activation,
    *,
    write_h: bool = False,
) -> GatedGradients:
    """Gradients of `lora_gated_forward`, where that of `h` is `grad_h + grad_low a`, and of `a`.

    Args:
        grad_h: (N, I) contiguous, without the low-rank term of the projection that follows. Its memory may be used.
        gul: (N, 2 I + R), b_gate, b_up: as in forward.
        grad_low: (N, r) contiguous, the gradient of the low-rank input of that projection, `h a^T`.
        a: (r, I) contiguous, its A.
        act: the activation.
        write_h: whether `grad_h` becomes `h`.

    Returns:
        The gradients, in the dtype of `gul`; those of the factors are summed in fp32 over products of rounded values.
    """
    num_rows, size = grad_h.shape
    ranks = (b_gate.shape[1], b_up.shape[1], a.shape[0])
    grad_gul = torch.empty_like(gul)
    if not _fits(grad_h, gul, b_gate, b_up, grad_low, a, ranks=ranks):
        if ranks[2]:
            grad_h.addmm_(grad_low, a)
        gate, up = _add_low_rank(gul, b_gate, b_up)
        grad_gate, grad_up, *_ = grad_gul.split(_columns(gul, b_gate, b_up), dim=1)
        h, *grads = gated_backward(grad_h, gate, up, act)
        grad_gate.copy_(grads[0])
        grad_up.copy_(grads[1])
        return _multiply_factors(grad_gul, h, gul, b_gate, b_up, grad_low)
    summed = max(ranks) <= MAX_SUMMED_RANK
    tile = _SUMMING_TILE if summed else _plain_tile(*ranks)
    grid = _grid(num_rows, size, tile)
    sums = torch.empty(grid[1], size * sum(ranks) if summed else 0, dtype=torch.float32, device=gul.device)
    if num_rows:
        with torch.cuda.device(gul.device):
            _backward_kernel[grid](
                grad_h, gul, grad_gul, b_gate, b_up, grad_low, a, sums, num_rows, size, gul.shape[1],
                SUMS=summed, WRITE_H=write_h or not summed, **_cut(act, tile, GATE=ranks[0], UP=ranks[1], DOWN=ranks[2]),
            )  # fmt: skip
    if write_h or not summed:
        torch.autograd.graph.increment_version(grad_h)
    if not summed:
        return _multiply_factors(grad_gul, grad_h, gul, b_gate, b_up, grad_low)
    _multiply_back(grad_gul, b_gate, b_up)
    shapes = ((size, ranks[0]), (size, ranks[1]), (ranks[2], size))
    factors = [gul.new_empty(shape) for shape in shapes]
    sum_rows(sums, factors)
    return GatedGradients(grad_gul, *factors)


def _multiply_back(grad_gul: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor) -> None:
    """Fill the last columns with the gradients of the low-rank inputs."""
    grad_gate, grad_up, low_gate, low_up, rest = grad_gul.split(_columns(grad_gul, b_gate, b_up), dim=1)
    rest.zero_()
    ranks = (b_gate.shape[1], b_up.shape[1])
    if grad_gul.shape[0] and 0 < max(ranks) <= MAX_BACK_RANK and _fits(grad_gul, b_gate, b_up, ranks=ranks):
        tile = _back_tile(grad_gul.shape[0])
        with torch.cuda.device(grad_gul.device):
            _back_kernel[(-(-grad_gul.shape[0] // tile.rows), 2)](
                grad_gul, b_gate, b_up, grad_gul.shape[0], b_gate.shape[0], grad_gul.shape[1],
                RANK_GATE=ranks[0], RANK_UP=ranks[1], PADDED=_padded(max(ranks)),
                ROWS=tile.rows, COLUMNS=tile.columns, STAGES=tile.stages, num_warps=tile.warps,
            )  # fmt: skip
        return
    torch.mm(grad_gate, b_gate, out=low_gate)
    torch.mm(grad_up, b_up, out=low_up)


def _multiply_factors(
    grad_gul: torch.Tensor,
    h: torch.Tensor,
    gul: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
    grad_low: torch.Tensor,
) -> GatedGradients:
    """The other gradients from those of gate and of up."""
    columns = _columns(gul, b_gate, b_up)
    grad_gate, grad_up, grad_low_gate, grad_low_up, rest = grad_gul.split(columns, dim=1)
    _, _, low_gate, low_up, _ = gul.split(columns, dim=1)
    rest.zero_()
    _, grad_b_gate = factor_gradients(grad_gate, b_gate, low_gate, grad_low_gate)
    _, grad_b_up = factor_gradients(grad_up, b_up, low_up, grad_low_up)
    return GatedGradients(grad_gul, grad_b_gate, grad_b_up, grad_low.t() @ h)
