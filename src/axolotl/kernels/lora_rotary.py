"""Rotary position embedding (RoPE) of queries and keys that still lack their low-rank terms and lie in one matrix with the values.

    query = rotate(y_q + low_q B_q^T + bias_q),   key = rotate(y_k + low_k B_k^T + bias_k),   value = y_v + low_v B_v^T + bias_v
    rotate(x) = [x_1, x_2] * cos + [-x_2, x_1] * sin, x_1 and x_2 the halves of a head       https://arxiv.org/abs/2104.09864

The low-rank inputs `x A^T` of the three lie beside them. One pass reads what the joint matmul wrote, forms the low-rank terms in
registers and writes the three as tensors of their own; one pass of backward rotates their gradients back and lays them side by
side for the joint matmul. Projections are rounded before they are rotated, as where each is a layer of its own; rotated in fp32
and rounded once.

Shape legend: B batch, T time, N tokens (B*T), O features of all projections, D features of a head, r rank (any, 0 for none; each
may differ), R all ranks, rounded up.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

from axolotl.kernels.lora_factors import _load_factor, _padded
from axolotl.kernels.utils import jit, runs_triton, tl, triton

HEAD_SIZES = (64, 128, 256)
"""Both halves of a head are tiles, whose sides are powers of two."""

MAX_FACTOR = 128 * 128
"""Elements of a head's B (D, r), r as padded. Above, they do not fit into the shared memory of smaller GPUs."""

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Biases = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Tile(NamedTuple):
    """How a kernel cuts its matrices.

    Attributes:
        rows: tokens of a program; what it rotates by is read once for all its heads.
        heads: of one projection that a program does, one after the other.
        warps: of a program.
        stages: heads that are loaded at a time, all but one of them ahead.
    """

    rows: int
    heads: int
    warps: int
    stages: int


_FORWARD_TILE = Tile(rows=32, heads=8, warps=4, stages=3)
_FORWARD_TILE_LARGE = Tile(rows=16, heads=8, warps=4, stages=2)  # for factors of a quarter of what fits and more
_BACKWARD_TILE = Tile(rows=8, heads=8, warps=2, stages=3)


# --- kernels ------------------------------------------------------------------------------------------------------------
#
# A program does some heads of one projection; which one is the same for all its threads. Columns count in 32 bits, rows in 64.


@jit
def _load_halves(ptr, at, inside, HALF: tl.constexpr):
    """The two halves of a head, (rows, HALF) each."""
    return tl.load(ptr + at, mask=inside, other=0.0), tl.load(ptr + at + HALF, mask=inside, other=0.0)


@jit
def _forward_heads(
    y_ptr, out_ptr, low_ptr, b_ptr, bias_ptr, cos_ptr, sin_ptr, rows, at_table, num_rows, width, b_width, first, num_heads,
    RANK: tl.constexpr, PADDED: tl.constexpr, BIAS: tl.constexpr, ROTATES: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    half = tl.arange(0, HALF)
    inside = (rows[:, None] < num_rows) & (half[None, :] < HALF)
    at = rows.to(tl.int64)[:, None] * width + half[None, :]
    at_out = rows.to(tl.int64)[:, None] * (num_heads * 2 * HALF) + half[None, :]
    dtype = out_ptr.dtype.element_ty
    low = _load_factor(low_ptr, rows, num_rows, width, RANK, PADDED)
    cos_1, cos_2 = _load_halves(cos_ptr, at_table[:, None] + half[None, :], inside & ROTATES, HALF)
    sin_1, sin_2 = _load_halves(sin_ptr, at_table[:, None] + half[None, :], inside & ROTATES, HALF)
    for head in tl.range(first, tl.minimum(first + HEADS, num_heads), num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        column = head * (2 * HALF)
        x_1, x_2 = _load_halves(y_ptr + column, at, inside, HALF)
        x_1, x_2 = x_1.to(tl.float32), x_2.to(tl.float32)
        if RANK > 0:
            b_1 = _load_factor(b_ptr, column + half, num_heads * 2 * HALF, b_width, RANK, PADDED)
            b_2 = _load_factor(b_ptr, column + HALF + half, num_heads * 2 * HALF, b_width, RANK, PADDED)
            x_1 = tl.dot(low, tl.trans(b_1), x_1)
            x_2 = tl.dot(low, tl.trans(b_2), x_2)
        if BIAS:
            x_1 += tl.load(bias_ptr + column + half).to(tl.float32)[None, :]
            x_2 += tl.load(bias_ptr + column + HALF + half).to(tl.float32)[None, :]
        y_1, y_2 = x_1.to(dtype), x_2.to(dtype)
        if ROTATES:
            x_1, x_2 = y_1.to(tl.float32), y_2.to(tl.float32)
            y_1 = (x_1 * cos_1.to(tl.float32) - x_2 * sin_1.to(tl.float32)).to(dtype)
            y_2 = (x_2 * cos_2.to(tl.float32) + x_1 * sin_2.to(tl.float32)).to(dtype)
        tl.store(out_ptr + column + at_out, y_1, mask=inside)
        tl.store(out_ptr + column + HALF + at_out, y_2, mask=inside)


@jit
def _forward_kernel(
    yl_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, b_q_ptr, b_k_ptr, b_v_ptr, bias_q_ptr, bias_k_ptr, bias_v_ptr,
    num_rows, width, b_width, time, table_batch, table_time, heads_q, heads_k, heads_v,
    RANK_Q: tl.constexpr, PADDED_Q: tl.constexpr, BIAS_Q: tl.constexpr,
    RANK_K: tl.constexpr, PADDED_K: tl.constexpr, BIAS_K: tl.constexpr,
    RANK_V: tl.constexpr, PADDED_V: tl.constexpr, BIAS_V: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    groups_q, groups_k, groups_v = tl.cdiv(heads_q, HEADS), tl.cdiv(heads_k, HEADS), tl.cdiv(heads_v, HEADS)
    groups = groups_q + groups_k + groups_v
    group = tl.program_id(0) % groups
    rows = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)
    at_table = (rows // time).to(tl.int64) * table_batch + (rows % time).to(tl.int64) * table_time
    low_ptr = yl_ptr + (heads_q + heads_k + heads_v) * (2 * HALF)
    if group < groups_q:
        _forward_heads(
            yl_ptr, q_ptr, low_ptr, b_q_ptr, bias_q_ptr, cos_ptr, sin_ptr, rows, at_table, num_rows, width, b_width,
            group * HEADS, heads_q, RANK_Q, PADDED_Q, BIAS_Q, True, HALF, HEADS, STAGES,
        )  # fmt: skip
    elif group < groups_q + groups_k:
        _forward_heads(
            yl_ptr + heads_q * (2 * HALF), k_ptr, low_ptr + RANK_Q, b_k_ptr, bias_k_ptr, cos_ptr, sin_ptr,
            rows, at_table, num_rows, width, b_width,
            (group - groups_q) * HEADS, heads_k, RANK_K, PADDED_K, BIAS_K, True, HALF, HEADS, STAGES,
        )  # fmt: skip
    else:
        _forward_heads(
            yl_ptr + (heads_q + heads_k) * (2 * HALF), v_ptr, low_ptr + RANK_Q + RANK_K, b_v_ptr, bias_v_ptr, cos_ptr, sin_ptr,
            rows, at_table, num_rows, width, b_width,
            (group - groups_q - groups_k) * HEADS, heads_v, RANK_V, PADDED_V, BIAS_V, False, HALF, HEADS, STAGES,
        )  # fmt: skip


@jit
def _backward_heads(
    grad_ptr, grad_y_ptr, cos_ptr, sin_ptr, rows, at_table, num_rows, width, time, batch_stride, time_stride, head_stride,
    first, num_heads,
    ROTATES: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    half = tl.arange(0, HALF)
    inside = (rows[:, None] < num_rows) & (half[None, :] < HALF)
    at_grad = (rows // time).to(tl.int64) * batch_stride + (rows % time).to(tl.int64) * time_stride
    at = at_grad[:, None] + half[None, :]
    at_y = rows.to(tl.int64)[:, None] * width + half[None, :]
    dtype = grad_y_ptr.dtype.element_ty
    cos_1, cos_2 = _load_halves(cos_ptr, at_table[:, None] + half[None, :], inside & ROTATES, HALF)
    sin_1, sin_2 = _load_halves(sin_ptr, at_table[:, None] + half[None, :], inside & ROTATES, HALF)
    for head in tl.range(first, tl.minimum(first + HEADS, num_heads), num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        g_1, g_2 = _load_halves(grad_ptr + tl.cast(head, tl.int64) * head_stride, at, inside, HALF)
        if ROTATES:
            y_1, y_2 = g_1.to(tl.float32), g_2.to(tl.float32)
            g_1 = (y_1 * cos_1.to(tl.float32) + y_2 * sin_2.to(tl.float32)).to(dtype)
            g_2 = (y_2 * cos_2.to(tl.float32) - y_1 * sin_1.to(tl.float32)).to(dtype)
        column = head * (2 * HALF)
        tl.store(grad_y_ptr + column + at_y, g_1, mask=inside)
        tl.store(grad_y_ptr + column + HALF + at_y, g_2, mask=inside)


@jit
def _backward_kernel(
    grad_y_ptr, cos_ptr, sin_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    num_rows, width, time, table_batch, table_time, heads_q, heads_k, heads_v,
    HALF: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    groups_q, groups_k, groups_v = tl.cdiv(heads_q, HEADS), tl.cdiv(heads_k, HEADS), tl.cdiv(heads_v, HEADS)
    groups = groups_q + groups_k + groups_v
    group = tl.program_id(0) % groups
    rows = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)
    at_table = (rows // time).to(tl.int64) * table_batch + (rows % time).to(tl.int64) * table_time
    if group < groups_q:
        _backward_heads(
            grad_q_ptr, grad_y_ptr, cos_ptr, sin_ptr, rows, at_table, num_rows, width, time, q_batch, q_time, q_head,
            group * HEADS, heads_q, True, HALF, HEADS, STAGES,
        )  # fmt: skip
    elif group < groups_q + groups_k:
        _backward_heads(
            grad_k_ptr, grad_y_ptr + heads_q * (2 * HALF), cos_ptr, sin_ptr,
            rows, at_table, num_rows, width, time, k_batch, k_time, k_head,
            (group - groups_q) * HEADS, heads_k, True, HALF, HEADS, STAGES,
        )  # fmt: skip
    else:
        _backward_heads(
            grad_v_ptr, grad_y_ptr + (heads_q + heads_k) * (2 * HALF), cos_ptr, sin_ptr,
            rows, at_table, num_rows, width, time, v_batch, v_time, v_head,
            (group - groups_q - groups_k) * HEADS, heads_v, False, HALF, HEADS, STAGES,
        )  # fmt: skip


def has_kernel(dtype: torch.dtype, head_size: int, ranks: tuple[int, ...]) -> bool:
    """Whether the kernels are made for tensors of this kind, on CUDA."""
    half = dtype in (torch.float16, torch.bfloat16)
    return (
        triton is not None and half and head_size in HEAD_SIZES and max(map(_padded, ranks)) * head_size <= MAX_FACTOR
    )


def _num_programs(num_rows: int, heads: list[int], tile: Tile) -> tuple[int]:
    return (-(-num_rows // tile.rows) * sum(-(-count // tile.heads) for count in heads),)


def _launch_forward(
    yl: torch.Tensor, factors: Three, biases: Biases, cos: torch.Tensor, sin: torch.Tensor, out: Three
) -> None:
    (batch, time, width), size, heads = yl.shape, cos.shape[-1], [part.shape[2] for part in out]
    ranks: dict[str, Any] = {}
    for name, b, bias in zip("QKV", factors, biases, strict=True):
        ranks |= {f"RANK_{name}": b.shape[1], f"PADDED_{name}": _padded(b.shape[1]), f"BIAS_{name}": bias is not None}
    large = 4 * size * max(_padded(b.shape[1]) for b in factors) >= MAX_FACTOR
    tile = _FORWARD_TILE_LARGE if large else _FORWARD_TILE
    _forward_kernel[_num_programs(batch * time, heads, tile)](
        yl, cos, sin, *out, *factors, *biases, batch * time, width, factors[0].stride(0), time, *cos.stride()[:2], *heads,
        **ranks, HALF=size // 2, ROWS=tile.rows, HEADS=tile.heads, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip


def _launch_backward(grads: Three, cos: torch.Tensor, sin: torch.Tensor, grad_y: torch.Tensor) -> None:
    (batch, time, width), heads, tile = grad_y.shape, [grad.shape[2] for grad in grads], _BACKWARD_TILE
    strides = itertools.chain(*((grad.stride(0), grad.stride(1), grad.stride(2)) for grad in grads))
    _backward_kernel[_num_programs(batch * time, heads, tile)](
        grad_y, cos, sin, *grads, *strides, batch * time, width, time, *cos.stride()[:2], *heads,
        HALF=cos.shape[-1] // 2, ROWS=tile.rows, HEADS=tile.heads, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip


# --- both bodies --------------------------------------------------------------------------------------------------------


def _read_tables(cos: torch.Tensor, sin: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as (B, T, D) with the same strides and no gaps in a row; B and T are those of `like`."""
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    shape = (like.shape[0], like.shape[1], cos.shape[2])
    return cos.expand(shape), sin.expand(shape)


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the last dimension, in fp32 or wider."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return first, second


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x * cos + rotate_half(x) * sin` in fp32, in the dtype of x; x (B, T, heads, D), cos and sin (B, T, D)."""
    (x_1, x_2), (cos_1, cos_2), (sin_1, sin_2) = _halves(x), _halves(cos[:, :, None]), _halves(sin[:, :, None])
    return torch.cat([x_1 * cos_1 - x_2 * sin_1, x_2 * cos_2 + x_1 * sin_2], dim=-1).to(x.dtype)


def _rotate_back(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The gradient of x in `rotate`."""
    (y_1, y_2), (cos_1, cos_2), (sin_1, sin_2) = _halves(grad), _halves(cos[:, :, None]), _halves(sin[:, :, None])
    return torch.cat([y_1 * cos_1 + y_2 * sin_2, y_2 * cos_2 - y_1 * sin_1], dim=-1).to(grad.dtype)


def lora_rotary_forward(
    yl: torch.Tensor, factors: Three, biases: Biases, cos: torch.Tensor, sin: torch.Tensor
) -> Three:
    """Queries and keys, rotated, and values.

    Args:
        yl: (B, T, O + R) contiguous: the three without their low-rank terms and biases, then `x A^T` of the three, side by side.
            What is left of the R columns is not read.
        factors: the scaled B of each, (features, r), parts of rows that are equally far apart; none of 0 features.
        biases: of each (features,), or None.
        cos: (B, T, D) or (1, T, D), of any floating dtype.
        sin: as `cos`.

    Returns:
        (B, T, heads, D) each, contiguous, in the dtype of `yl`.
    """
    cos, sin = _read_tables(cos, sin, yl)
    size, ranks = cos.shape[2], [b.shape[1] for b in factors]
    shapes = [(*yl.shape[:2], b.shape[0] // size, size) for b in factors]
    regular = len({b.stride(0) for b in factors}) == 1 and all(b.stride(1) == 1 for b in factors)
    if has_kernel(yl.dtype, size, tuple(ranks)) and regular and runs_triton(yl, *(b for b in biases if b is not None)):
        query, key, value = (yl.new_empty(shape) for shape in shapes)
        if yl.numel():
            with torch.cuda.device(yl.device):
                _launch_forward(yl, factors, biases, cos, sin, (query, key, value))
        return query, key, value
    wide = torch.promote_types(yl.dtype, torch.float32)
    columns = [*(b.shape[0] for b in factors), *ranks]
    pieces = yl.to(wide).split([*columns, yl.shape[2] - sum(columns)], dim=2)
    parts = []
    for y, low, b, bias, shape in zip(pieces[:3], pieces[3:6], factors, biases, shapes, strict=True):
        whole = y + low @ b.to(wide).t()
        parts.append((whole if bias is None else whole + bias).to(yl.dtype).view(shape))
    return rotate(parts[0], cos, sin), rotate(parts[1], cos, sin), parts[2]


def lora_rotary_backward(grads: Three, cos: torch.Tensor, sin: torch.Tensor, more: int = 0) -> torch.Tensor:
    """The gradient of the three side by side in `lora_rotary_forward`.

    Args:
        grads: of queries, keys and values, (B, T, heads, D) each, with any strides.
        cos: as in forward.
        sin: as in forward.
        more: columns that are left for the gradient of the low-rank inputs.

    Returns:
        (B, T, O + `more`) contiguous, in the dtype of the gradients; the last columns are not written.
    """
    query, key, value = (grad if grad.stride(3) == 1 else grad.contiguous() for grad in grads)
    cos, sin = _read_tables(cos, sin, query)
    batch, time, _, size = query.shape
    # The kernel reads gradients with gaps between their rows.
    if has_kernel(query.dtype, size, (0,)) and runs_triton() and query.is_cuda:
        grad_y = query.new_empty(batch, time, sum(grad.shape[2] for grad in (query, key, value)) * size + more)
        if grad_y.numel():
            with torch.cuda.device(query.device):
                _launch_backward((query, key, value), cos, sin, grad_y)
        return grad_y
    parts = (_rotate_back(query, cos, sin), _rotate_back(key, cos, sin), value)
    return torch.cat([*(part.reshape(batch, time, -1) for part in parts), query.new_empty(batch, time, more)], dim=2)
