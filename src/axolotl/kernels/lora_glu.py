"""Gated activations whose inputs still lack their low-rank terms.

    gate = y_gate + low_gate B_gate^T,   up = y_up + low_up B_up^T,   h = act(gate) * up

Added by separate matmuls, the low-rank terms cost one pass over gate and one over up each, forward and backward. Here they
are formed in registers while the activation reads its inputs: the products of a tile are (rows, rank) by (rank, columns).
Backward forms the low-rank term of its incoming gradient in the same way. fp32 inside, rounded once.

Shape legend: N tokens, I features of gate and of up, r rank (any, 0 for none; each may differ).
"""

from __future__ import annotations

import torch

from axolotl.kernels.glu import Activation, _act_and_slope, gated_backward, gated_forward
from axolotl.kernels.utils import jit, runs_triton, tl

MAX_RANK = 128
"""Above, a tile of B does not fit beside the tiles of the activations, and plain matmuls do the work."""

# Rows and columns of a tile, tiles that a program does one below the other, and warps: the fastest on an H200 at rank 16.
# Larger tiles run out of registers in backward; several tiles read their part of the B matrices once.
_FORWARD_TILE = (16, 128, 8, 2)
_BACKWARD_TILE = (16, 128, 8, 4)
_STAGES = 2


@jit
def _load_factor(ptr, at, num, stride, RANK: tl.constexpr, PADDED: tl.constexpr):
    """Rows `at` of a low-rank factor (num, RANK) with row stride `stride`, filled up with zeros: (len(at), PADDED)."""
    rank = tl.arange(0, PADDED)
    return tl.load(
        ptr + at[:, None] * stride + rank[None, :], mask=(at[:, None] < num) & (rank[None, :] < RANK), other=0.0
    )


@jit
def _forward_kernel(
    gu_ptr, h_ptr, low_ptr, b_gate_ptr, b_up_ptr, num_rows, num_columns, low_stride,
    RANK_GATE: tl.constexpr, PADDED_GATE: tl.constexpr, RANK_UP: tl.constexpr, PADDED_UP: tl.constexpr,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b_gate = tl.trans(_load_factor(b_gate_ptr, columns, num_columns, RANK_GATE, RANK_GATE, PADDED_GATE))
    b_up = tl.trans(_load_factor(b_up_ptr, columns, num_columns, RANK_UP, RANK_UP, PADDED_UP))
    for tile in range(TILES):
        rows = (tl.program_id(1).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
        at = rows[:, None] * (2 * num_columns) + columns[None, :]
        gate = tl.load(gu_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gu_ptr + at + num_columns, mask=inside, other=0.0).to(tl.float32)
        if RANK_GATE > 0:
            gate += tl.dot(_load_factor(low_ptr, rows, num_rows, low_stride, RANK_GATE, PADDED_GATE), b_gate)
        if RANK_UP > 0:
            up += tl.dot(_load_factor(low_ptr + RANK_GATE, rows, num_rows, low_stride, RANK_UP, PADDED_UP), b_up)
        act, _ = _act_and_slope(gate, ACT)
        h = (act * up).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows[:, None] * num_columns + columns[None, :], h, mask=inside)


@jit
def _backward_kernel(
    grad_ptr, gu_ptr, grad_gu_ptr, low_ptr, b_gate_ptr, b_up_ptr, grad_low_ptr, a_ptr, num_rows, num_columns, low_stride,
    RANK_GATE: tl.constexpr, PADDED_GATE: tl.constexpr, RANK_UP: tl.constexpr, PADDED_UP: tl.constexpr,
    RANK_DOWN: tl.constexpr, PADDED_DOWN: tl.constexpr,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b_gate = tl.trans(_load_factor(b_gate_ptr, columns, num_columns, RANK_GATE, RANK_GATE, PADDED_GATE))
    b_up = tl.trans(_load_factor(b_up_ptr, columns, num_columns, RANK_UP, RANK_UP, PADDED_UP))
    a = tl.trans(_load_factor(a_ptr, columns, num_columns, RANK_DOWN, RANK_DOWN, PADDED_DOWN))
    dtype = grad_gu_ptr.dtype.element_ty
    for tile in range(TILES):
        rows = (tl.program_id(1).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
        at = rows[:, None] * (2 * num_columns) + columns[None, :]
        at_h = rows[:, None] * num_columns + columns[None, :]
        gate = tl.load(gu_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gu_ptr + at + num_columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at_h, mask=inside, other=0.0).to(tl.float32)
        if RANK_GATE > 0:
            gate += tl.dot(_load_factor(low_ptr, rows, num_rows, low_stride, RANK_GATE, PADDED_GATE), b_gate)
        if RANK_UP > 0:
            up += tl.dot(_load_factor(low_ptr + RANK_GATE, rows, num_rows, low_stride, RANK_UP, PADDED_UP), b_up)
        if RANK_DOWN > 0:
            grad += tl.dot(_load_factor(grad_low_ptr, rows, num_rows, RANK_DOWN, RANK_DOWN, PADDED_DOWN), a)
        act, slope = _act_and_slope(gate, ACT)
        tl.store(grad_ptr + at_h, (act * up).to(dtype), mask=inside)
        tl.store(grad_gu_ptr + at, (grad * up * slope).to(dtype), mask=inside)
        tl.store(grad_gu_ptr + at + num_columns, (grad * act).to(dtype), mask=inside)


def _padded(rank: int) -> int:
    """Matrix units take at least 16 products; ranges have powers of two."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 16


def _fits(*tensors: torch.Tensor, ranks: tuple[int, ...]) -> bool:
    half = all(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    return half and max(ranks) <= MAX_RANK and runs_triton(*tensors)


def _grid(num_rows: int, num_columns: int, tile: tuple[int, int, int, int]) -> tuple[int, int]:
    return (-(-num_columns // tile[1]), -(-num_rows // (tile[0] * tile[2])))


def _add_low_rank(gu: torch.Tensor, low: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor) -> torch.Tensor:
    """The two inputs of the activation as a new (N, 2 I) tensor."""
    size, rank = b_gate.shape
    whole = gu.clone()
    if rank:
        whole[:, :size].addmm_(low[:, :rank], b_gate.t())
    if b_up.shape[1]:
        whole[:, size:].addmm_(low[:, rank:], b_up.t())
    return whole


def lora_gated_forward(
    gu: torch.Tensor, low: torch.Tensor, b_gate: torch.Tensor, b_up: torch.Tensor, act: Activation
) -> torch.Tensor:
    """`act(gate) * up`.

    Args:
        gu: (N, 2 I) contiguous, gate and up without their low-rank terms, side by side.
        low: (N, r_gate + r_up), `x A^T` of both, contiguous, in the dtype of `gu`.
        b_gate: (I, r_gate), scaled; b_up: (I, r_up).
        act: the activation.

    Returns:
        (N, I) in the dtype of `gu`.
    """
    num_rows, size = gu.shape[0], b_gate.shape[0]
    ranks = (b_gate.shape[1], b_up.shape[1])
    if not _fits(gu, low, b_gate, b_up, ranks=ranks):
        whole = _add_low_rank(gu, low, b_gate, b_up)
        return gated_forward(whole[:, :size].contiguous(), whole[:, size:].contiguous(), act)
    h = gu.new_empty(num_rows, size)
    if num_rows:
        with torch.cuda.device(gu.device):
            _forward_kernel[_grid(num_rows, size, _FORWARD_TILE)](
                gu, h, low, b_gate, b_up, num_rows, size, low.shape[1],
                RANK_GATE=ranks[0], PADDED_GATE=_padded(ranks[0]), RANK_UP=ranks[1], PADDED_UP=_padded(ranks[1]),
                ACT=act, ROWS=_FORWARD_TILE[0], COLUMNS=_FORWARD_TILE[1], TILES=_FORWARD_TILE[2],
                num_warps=_FORWARD_TILE[3], num_stages=_STAGES,
            )  # fmt: skip
    return h


def lora_gated_backward(
    grad_h: torch.Tensor,
    gu: torch.Tensor,
    low: torch.Tensor,
    b_gate: torch.Tensor,
    b_up: torch.Tensor,
    grad_low: torch.Tensor,
    a_T: torch.Tensor,
    act: Activation,
) -> torch.Tensor:
    """Gradient of `lora_gated_forward` by gate and up, where that of `h` is `grad_h + grad_low a_T^T`.

    Args:
        grad_h: (N, I) contiguous, without the low-rank term of the projection that follows. Becomes `h`.
        gu: (N, 2 I), as in forward; low, b_gate, b_up: as in forward.
        grad_low: (N, r) contiguous, the gradient of the low-rank input of that projection.
        a_T: (I, r) contiguous, its A transposed.
        act: the activation.

    Returns:
        (N, 2 I): the gradients of gate and of up, side by side.
    """
    num_rows, size = grad_h.shape
    ranks = (b_gate.shape[1], b_up.shape[1], a_T.shape[1])
    if not _fits(grad_h, gu, low, b_gate, b_up, grad_low, a_T, ranks=ranks):
        if ranks[2]:
            grad_h.addmm_(grad_low, a_T.t())
        whole = _add_low_rank(gu, low, b_gate, b_up)
        gate, up = whole[:, :size].contiguous(), whole[:, size:].contiguous()
        _, grad_gate, grad_up = gated_backward(grad_h, gate, up, act)
        return torch.cat([grad_gate, grad_up], dim=1)
    grad_gu = torch.empty_like(gu)
    if num_rows:
        with torch.cuda.device(gu.device):
            _backward_kernel[_grid(num_rows, size, _BACKWARD_TILE)](
                grad_h, gu, grad_gu, low, b_gate, b_up, grad_low, a_T, num_rows, size, low.shape[1],
                RANK_GATE=ranks[0], PADDED_GATE=_padded(ranks[0]), RANK_UP=ranks[1], PADDED_UP=_padded(ranks[1]),
                RANK_DOWN=ranks[2], PADDED_DOWN=_padded(ranks[2]),
                ACT=act, ROWS=_BACKWARD_TILE[0], COLUMNS=_BACKWARD_TILE[1], TILES=_BACKWARD_TILE[2],
                num_warps=_BACKWARD_TILE[3], num_stages=_STAGES,
            )  # fmt: skip
        torch.autograd.graph.increment_version(grad_h)
    return grad_gu
