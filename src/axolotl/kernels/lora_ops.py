"""LoRA projections inside `torch.compile`: one opaque operator for the projections of one input, one for their gradient.

    y_i = x W_i^T + (x A_i^T) (s_i B_i)^T

The compiler fuses norms, activations and residuals around the operators, decides what of those to keep for backward, and
cannot move what happens inside: dense copies of quantized weights live as long as one matmul. Arguments that default to None
are given by `axolotl.kernels.lora_graph`, which sees what is around an operator. The functions of
`axolotl.kernels.lora` are what runs without the compiler; PyTorch 2.11 gives a traced `autograd.Function` zero gradients when
its output ends in a conversion that changes nothing, as theirs may.

Shape legend: N tokens, H features in, O features out, r rank, R ranks of all projections.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F

from axolotl.kernels.frozen_weights import FrozenWeights, round_up_rank, rows_of
from axolotl.kernels.glu import Activation
from axolotl.kernels.lora_factors import factor_gradients, scale_rows
from axolotl.kernels.lora_glu import lora_gated_backward, lora_gated_forward
from axolotl.kernels.lora_rotary import has_kernel, lora_rotary_backward, lora_rotary_forward
from axolotl.kernels.lora_sum import add_low_rank
from axolotl.kernels.quantize import split_state
from axolotl.kernels.utils import compute_dtype

Projection = tuple[Any, ...]  # what `get_lora_parameters` returns


# --- projections of one input -------------------------------------------------------------------------------------------
#
# `b` is block-diagonal: a few zeros are multiplied, and every matrix is read and written once for all projections.


def _scaled(low_NR: torch.Tensor, scale_N1: torch.Tensor | None) -> torch.Tensor:
    return low_NR if scale_N1 is None else scale_rows(low_NR, scale_N1)


@torch.library.custom_op(
    "axolotl::lora_project",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] state, int[] layout, Tensor a, Tensor b, int room, Tensor? residual=None) "
    "-> (Tensor, Tensor)",
)
def _project(x, weights, state, layout, a, b, room, residual=None):
    """The outputs side by side (N, O), plus `residual` where it is given, and `x A^T` (N, R)."""
    frozen = FrozenWeights(weights, state, layout)
    if residual is None:
        low_NR = x @ a.t()
        return frozen.product(x, (low_NR, b.t())), low_NR
    yl = frozen.product_with(x, _filled_up(a, alone=len(weights) == 1), room)
    y_NO, low_NR = yl[:, : b.shape[0]], yl[:, b.shape[0] :][:, : a.shape[0]]
    kept_NR = x.new_empty(low_NR.shape)  # a copy: a view would keep all of yl
    return add_low_rank(y_NO, low_NR, b, residual, kept_NR), kept_NR


@_project.register_fake
def _(x, weights, state, layout, a, b, room, residual=None):
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op(
    "axolotl::lora_project_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor[] weights, Tensor[] state, int[] layout, Tensor a, Tensor b, Tensor low, "
    "bool need_x, Tensor? row_scale=None) -> (Tensor, Tensor, Tensor)",
)
def _project_backward(grad, x, weights, state, layout, a, b, low, need_x, row_scale=None):
    """The gradients of x (empty unless asked for), of a (R, H) and of b (O, R).

    That of a takes `x * row_scale` for x, where `row_scale` (N, 1) is given.
    """
    grad_low_NR, grad_b_OR = factor_gradients(grad, b, low)
    grad_a_RH = _scaled(grad_low_NR, row_scale).t() @ x
    if not need_x:
        return x.new_empty(0), grad_a_RH, grad_b_OR
    return FrozenWeights(weights, state, layout).product_back(grad, (grad_low_NR, a)), grad_a_RH, grad_b_OR


@_project_backward.register_fake
def _(grad, x, weights, state, layout, a, b, low, need_x, row_scale=None):
    return torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(a), torch.empty_like(b)


def _keep(ctx, inputs, output):
    x, weights, state, layout, a, b, _, residual = inputs
    ctx.save_for_backward(x, a, b, output[1], *weights, *state)
    ctx.count, ctx.layout, ctx.has_residual = len(weights), layout, residual is not None


def _differentiate(ctx, grad, _):
    x, a, b, low, *rest = ctx.saved_tensors
    weights, state = rest[: ctx.count], rest[ctx.count :]
    need_x = ctx.needs_input_grad[0]
    grad_x, grad_a, grad_b = torch.ops.axolotl.lora_project_backward(
        grad.contiguous(), x, weights, state, ctx.layout, a, b, low, need_x
    )
    # The dispatcher drops an argument that is its default, and then takes no gradient for it.
    residual = [grad] if ctx.has_residual else []
    return grad_x if need_x else None, [None] * ctx.count, [None] * len(state), None, grad_a, grad_b, None, *residual


_project.register_autograd(_differentiate, setup_context=_keep)


# --- projections of one input, apart from their low-rank terms ----------------------------------------------------------
#
# For outputs that a kernel reads next, which then adds the terms in registers: that of the MLP's activation, that of the rotation.
# The low-rank inputs lie beside the outputs, so that both come from one matmul, and so does the gradient of x.


@torch.library.custom_op(
    "axolotl::lora_project_apart",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] state, int[] layout, Tensor a, int room) -> Tensor",
)
def _project_apart(x, weights, state, layout, a, room):
    """The outputs without their low-rank terms, then `x A^T`, side by side: (N, O + R)."""
    return FrozenWeights(weights, state, layout).product_with(x, a, room)


@_project_apart.register_fake
def _(x, weights, state, layout, a, room):
    return x.new_empty(x.shape[0], sum(rows_of(weights, layout)) + a.shape[0])


@torch.library.custom_op(
    "axolotl::lora_project_apart_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor[] weights, Tensor[] state, int[] layout, Tensor a, int room, bool need_x, "
    "Tensor? row_scale=None) -> (Tensor, Tensor)",
)
def _project_apart_backward(grad, x, weights, state, layout, a, room, need_x, row_scale=None):
    """The gradients of x (empty unless asked for) and of a, the latter with `row_scale` as in `_project_backward`."""
    grad_a = _scaled(grad[:, grad.shape[1] - a.shape[0] :], row_scale).t() @ x
    if not need_x:
        return x.new_empty(0), grad_a
    return FrozenWeights(weights, state, layout).product_back_with(grad, a, room), grad_a


@_project_apart_backward.register_fake
def _(grad, x, weights, state, layout, a, room, need_x, row_scale=None):
    return torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(a)


def _keep_apart(ctx, inputs, output):
    x, weights, state, layout, a, room = inputs
    ctx.save_for_backward(x, a, *weights, *state)
    ctx.count, ctx.layout, ctx.room = len(weights), layout, room


def _differentiate_apart(ctx, grad):
    x, a, *rest = ctx.saved_tensors
    weights, state = rest[: ctx.count], rest[ctx.count :]
    need_x = ctx.needs_input_grad[0]
    grad_x, grad_a = torch.ops.axolotl.lora_project_apart_backward(
        grad.contiguous(), x, weights, state, ctx.layout, a, ctx.room, need_x
    )
    return grad_x if need_x else None, [None] * len(weights), [None] * len(state), None, grad_a, None


_project_apart.register_autograd(_differentiate_apart, setup_context=_keep_apart)


# --- the MLP: the activation of gate and up with down -------------------------------------------------------------------
#
# An operator of its own, so that a recomputed layer (gradient checkpointing) can leave it out: nothing needs its outputs.
# Elsewhere backward keeps `h A^T`, and is spared writing and reading h for it.

RECOMPUTED: ContextVar[bool] = ContextVar("axolotl_recomputed", default=False)
"""Whether the layer that is being traced runs again in backward, inside the same graph. Either value gives right gradients."""


@torch.compiler.assume_constant_result
def _keeps_outputs() -> bool:
    return not RECOMPUTED.get()


@torch.library.custom_op(
    "axolotl::lora_down",
    mutates_args=(),
    schema="(Tensor gul, Tensor b_gate, Tensor b_up, Tensor[] weights, Tensor[] state, int[] layout, "
    "Tensor a, Tensor b, int room, str act, bool keep_low, Tensor? residual=None) -> (Tensor, Tensor)",
)
def _down(gul, b_gate, b_up, weights, state, layout, a, b, room, act, keep_low, residual=None):
    """`h W^T + (h A^T) b^T` (N, O) with `h = act(gate) * up`, and `h A^T` (N, r), or (0, r) where backward does not keep it.

    Gate and up get their low-rank terms here. The rows of the first output are as far apart as if both lay side by side, as they
    come from one matmul; plus `residual` (N, O) in the same dtype, where it is given, it is contiguous.
    """
    h_NI = lora_gated_forward(gul, b_gate, b_up, act)
    yl = FrozenWeights(weights, state, layout).product_with(h_NI, _filled_up(a, alone=True), room)
    y_NO, low_Nr = yl[:, : b.shape[0]], yl[:, b.shape[0] :][:, : a.shape[0]]
    kept_Nr = gul.new_empty(gul.shape[0] if keep_low else 0, a.shape[0])  # a copy: a view would keep all of yl
    if residual is not None:
        return add_low_rank(y_NO, low_Nr, b, residual, kept_Nr if keep_low else None), kept_Nr
    if keep_low:
        kept_Nr.copy_(low_Nr)
    return y_NO.addmm_(low_Nr, b.t()) if a.shape[0] else y_NO, kept_Nr


@_down.register_fake
def _(gul, b_gate, b_up, weights, state, layout, a, b, room, act, keep_low, residual=None):
    num_rows, (size, rank) = gul.shape[0], b.shape
    y_NO = gul.new_empty(num_rows, size + (round_up_rank(rank, alone=True) if residual is None else 0))[:, :size]
    return y_NO, gul.new_empty(num_rows if keep_low else 0, rank)


@torch.library.custom_op(
    "axolotl::lora_down_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor gul, Tensor b_gate, Tensor b_up, Tensor[] weights, Tensor[] state, int[] layout, "
    "Tensor a, Tensor b, str act, Tensor low_down) -> Tensor[]",
)
def _down_backward(grad, gul, b_gate, b_up, weights, state, layout, a, b, act, low_down):
    """The gradients of gul, b_gate, b_up, a and b; `low_down` is the second output of the forward operator."""
    grad_h_NI = FrozenWeights(weights, state, layout).product_back(grad)
    if low_down.shape[0] == grad.shape[0]:
        grad_low_Nr, grad_b_Or = factor_gradients(grad, b, low_down)
        return [*lora_gated_backward(grad_h_NI, gul, b_gate, b_up, grad_low_Nr, a, act), grad_b_Or]
    grads = lora_gated_backward(grad_h_NI, gul, b_gate, b_up, grad @ b, a, act, write_h=True)
    h_NI = grad_h_NI
    return [*grads, grad.t() @ (h_NI @ a.t())]


@_down_backward.register_fake
def _(grad, gul, b_gate, b_up, weights, state, layout, a, b, act, low_down):
    return [torch.empty_like(tensor) for tensor in (gul, b_gate, b_up, a, b)]


def _keep_down(ctx, inputs, output):
    gul, b_gate, b_up, weights, state, layout, a, b, _, act, keep_low, residual = inputs
    # An output that is saved, be it empty, is an output that a recomputed layer needs.
    ctx.save_for_backward(gul, b_gate, b_up, a, b, output[1] if keep_low else None, *weights, *state)
    ctx.layout, ctx.act, ctx.has_residual = layout, act, residual is not None


def _differentiate_down(ctx, grad, _):
    gul, b_gate, b_up, a, b, low_down, weight, *state = ctx.saved_tensors
    if low_down is None:
        low_down = gul.new_empty(0, a.shape[0])
    grad_gul, grad_gate, grad_up, grad_a, grad_b = torch.ops.axolotl.lora_down_backward(
        grad.contiguous(), gul, b_gate, b_up, [weight], state, ctx.layout, a, b, ctx.act, low_down
    )
    residual = [grad] if ctx.has_residual else []  # as in `_differentiate`
    return grad_gul, grad_gate, grad_up, [None], [None] * len(state), None, grad_a, grad_b, None, None, None, *residual


_down.register_autograd(_differentiate_down, setup_context=_keep_down)


# --- the attention: the rotation of queries and keys --------------------------------------------------------------------
#
# Nothing of the joint matmul's output outlives the forward.


@torch.library.custom_op(
    "axolotl::lora_rotary",
    mutates_args=(),
    schema="(Tensor yl, Tensor b, int[] rows, int[] ranks, Tensor? bias_q, Tensor? bias_k, Tensor? bias_v, "
    "Tensor cos, Tensor sin) -> (Tensor, Tensor, Tensor)",
)
def _rotary(yl, b, rows, ranks, bias_q, bias_k, bias_v, cos, sin):
    """Queries and keys, rotated, and values: (B, T, heads, D) each. `yl` (B, T, O + R) gets its low-rank terms and biases here.

    `b` (O, R) is block-diagonal, of `rows` by `ranks` and then columns of zeros.
    """
    blocks = b.split(rows)
    b_q, b_k, b_v = (
        block.narrow(1, sum(ranks[:at]), rank) for at, (block, rank) in enumerate(zip(blocks, ranks, strict=True))
    )
    return lora_rotary_forward(yl, (b_q, b_k, b_v), (bias_q, bias_k, bias_v), cos, sin)


@_rotary.register_fake
def _(yl, b, rows, ranks, bias_q, bias_k, bias_v, cos, sin):
    size = cos.shape[-1]
    query, key, value = (yl.new_empty(*yl.shape[:2], count // size, size) for count in rows)
    return query, key, value


@torch.library.custom_op(
    "axolotl::lora_rotary_backward",
    mutates_args=(),
    schema="(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor low, Tensor b, int[] ranks, Tensor cos, Tensor sin) "
    "-> (Tensor, Tensor)",
)
def _rotary_backward(grad_q, grad_k, grad_v, low, b, ranks, cos, sin):
    """The gradients of yl and b, of which the blocks count; `low` (N, R) are the last columns of yl."""
    grads = (grad_q, grad_k, grad_v)
    grad_yl = lora_rotary_backward(grads, cos, sin, low.shape[1])
    grad_y_NO, grad_low_NR = grad_yl.flatten(0, 1).split(b.shape, dim=1)
    rows = [grad.shape[2] * grad.shape[3] for grad in grads]
    _, grad_b_OR = factor_gradients(grad_y_NO, b, low, grad_low_NR, list(zip(rows, ranks, strict=True)))
    return grad_yl, grad_b_OR


@_rotary_backward.register_fake
def _(grad_q, grad_k, grad_v, low, b, ranks, cos, sin):
    return grad_q.new_empty(*grad_q.shape[:2], sum(b.shape)), torch.empty_like(b)


def _keep_rotary(ctx, inputs, output):
    yl, b, _, ranks, _, _, _, cos, sin = inputs
    ctx.ranks = ranks
    # A copy: a view would keep all of yl. Of nothing, the compiler makes a view again.
    size, rank = b.shape
    low = yl.flatten(0, 1)[:, size:].clone() if rank else yl.new_empty(yl.shape[:2].numel(), 0)
    ctx.save_for_backward(low, b, cos, sin)


def _differentiate_rotary(ctx, grad_q, grad_k, grad_v):
    low, b, cos, sin = ctx.saved_tensors
    grad_yl, grad_b = torch.ops.axolotl.lora_rotary_backward(grad_q, grad_k, grad_v, low, b, ctx.ranks, cos, sin)
    return grad_yl, grad_b, None, None, None, None, None, None, None


_rotary.register_autograd(_differentiate_rotary, setup_context=_keep_rotary)


# --- what the modules call ----------------------------------------------------------------------------------------------


def _read_frozen(projections: list[Projection]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int], list[int]]:
    """The weights, states and layout that an operator takes, and the number of output features of each weight."""
    weights, state, layout, rows = [], [], [], []
    for weight, _, quant, *_ in projections:
        tensors, numbers = split_state(quant)
        weights.append(weight)
        rows.append(numbers[0] or weight.shape[0])
        state.extend(tensor for tensor in tensors if tensor is not None)
        layout.extend([*numbers, sum((tensor is not None) << bit for bit, tensor in enumerate(tensors))])
    return weights, state, layout, rows


def _read_adapters(
    projections: list[Projection], rows: list[int], columns: int, like: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The A matrices of all projections, one below the other, and `s B` of each, in the dtype of `like`."""
    adapted = [A for _, _, _, A, _, _ in projections if A is not None]
    a_RH = torch.cat(adapted).to(like.dtype) if adapted else like.new_zeros(0, columns)
    b_Or = [
        like.new_zeros(count, 0) if B is None else (B * s).to(like.dtype)
        for count, (_, _, _, _, B, s) in zip(rows, projections, strict=True)
    ]
    return a_RH, b_Or


def _filled_up(a: torch.Tensor, *, alone: bool = False) -> torch.Tensor:
    """a (R, H), then rows of zeros; `alone` as in `round_up_rank`."""
    more = round_up_rank(a.shape[0], alone=alone) - a.shape[0]
    return F.pad(a, (0, 0, 0, more)) if more else a


def _block_diagonal(blocks: list[torch.Tensor]) -> torch.Tensor:
    """(O, R) of blocks (O_i, r_i)."""
    total, start, rows = sum(block.shape[1] for block in blocks), 0, []
    for block in blocks:
        stop = start + block.shape[1]
        rows.append(F.pad(block, (start, total - stop)))
        start = stop
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def project_in_graph(x: torch.Tensor, projections: list[Projection], room: int = 0) -> list[torch.Tensor]:
    """All projections of one input, for use under `torch.compile`.

    Args:
        x: (..., H).
        projections: per projection `(W, b, quant_state, A, B, s)` as `get_lora_parameters` gives them; W and b are frozen.
        room: rows that `lay_in_a_row` left below the weights.

    Returns:
        Per projection (..., O), in the dtype of autocast where it is on, else that of x.
    """
    dtype = compute_dtype(x.device.type, x.dtype)
    x_NH = x.reshape(-1, x.shape[-1]).to(dtype)
    weights, state, layout, rows = _read_frozen(projections)
    with torch.autocast(x.device.type, enabled=False):
        a_RH, b_Or = _read_adapters(projections, rows, x_NH.shape[-1], x_NH)
        y_NO, _ = torch.ops.axolotl.lora_project(x_NH, weights, state, layout, a_RH, _block_diagonal(b_Or), room)
        biases = [bias for _, bias, *_ in projections]
        first, *others = y_NO.split(rows, dim=1) if len(rows) > 1 else [y_NO]
        # What is kept for backward as it is, such as the values of an attention, must not keep the others with it.
        parts = [first, *(part.clone(memory_format=torch.contiguous_format) for part in others)]
        outputs = [part if bias is None else part + bias.to(dtype) for part, bias in zip(parts, biases, strict=True)]
    kept = dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
    return [y.view(*x.shape[:-1], y.shape[-1]).to(kept) for y in outputs]


def rotates_in_graph(
    x: torch.Tensor, ranks: tuple[int, ...], head_size: int, cos: torch.Tensor, sin: torch.Tensor
) -> bool:
    """Whether the operator `lora_rotary` rotates this, and does so at least as fast as the compiler's own code.

    Args:
        x: (..., H).
        ranks: of the adapters of query, key and value; 0 for none.
        head_size: features of a head.
        cos: what the model rotates by, and so is `sin`.
    """
    tables = cos.dim() == sin.dim() == 3 and cos.shape[-1] == sin.shape[-1] == head_size and x.dim() == 3
    if not tables or cos.requires_grad or sin.requires_grad:
        return False
    return not x.is_cuda or has_kernel(compute_dtype("cuda", x.dtype), head_size, ranks)


def rotate_in_graph(
    yl: torch.Tensor,
    b: torch.Tensor,
    rows: list[int],
    ranks: list[int],
    biases: list[torch.Tensor | None],
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys with their positions, and values, of one output of the three; where `rotates_in_graph`.

    Args:
        yl: (B, T, O + R), the three side by side, then their low-rank inputs.
        b: (O, R), block-diagonal, whose products with those are added.
        rows: features of each of the three, O together.
        ranks: of each, 0 for none.
        biases: of each (features,), or None; frozen.
        cos: (B, T, D) or (1, T, D), where D are the features of a head.
        sin: as `cos`.

    Returns:
        Queries and keys (B, T, heads, D) and values (B, T, O), each a memory of its own.
    """
    query, key, value = torch.ops.axolotl.lora_rotary(yl, b, rows, ranks, *biases, cos, sin)
    return query, key, value.flatten(2)


def project_rotated_in_graph(
    x: torch.Tensor, projections: list[Projection], cos: torch.Tensor, sin: torch.Tensor, room: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys with their positions, and values, for use under `torch.compile` where `rotates_in_graph`.

    Args:
        x: (B, T, H).
        projections: query, key and value, as in `project_in_graph`.
        cos: (B, T, D) or (1, T, D), where D are the features of a head.
        sin: as `cos`.
        room: rows that `lay_in_a_row` left below the weights.

    Returns:
        Queries and keys (B, T, heads, D) and values (B, T, O), in the dtype of autocast where it is on, else that of x.
    """
    dtype = compute_dtype(x.device.type, x.dtype)
    x_NH = x.reshape(-1, x.shape[-1]).to(dtype)
    weights, state, layout, rows = _read_frozen(projections)
    with torch.autocast(x.device.type, enabled=False):
        a_RH, b_Or = _read_adapters(projections, rows, x_NH.shape[-1], x_NH)
        yl = torch.ops.axolotl.lora_project_apart(x_NH, weights, state, layout, _filled_up(a_RH), room)
        biases = [None if bias is None else bias.to(dtype) for _, bias, *_ in projections]
        yl = yl.view(*x.shape[:-1], yl.shape[-1])
        ranks = [b.shape[1] for b in b_Or]
        b_OR = F.pad(_block_diagonal(b_Or), (0, round_up_rank(sum(ranks)) - sum(ranks)))
        return rotate_in_graph(yl, b_OR, rows, ranks, biases, cos, sin)


def mlp_in_graph(
    x: torch.Tensor, projections: list[Projection], act: Activation, room: int = 0, room_down: int = 0
) -> torch.Tensor:
    """`down(act(gate(x)) * up(x))`, for use under `torch.compile`.

    Args:
        x: (..., H).
        projections: gate, up and down, as in `project_in_graph`, without biases.
        act: the activation.
        room: rows that `lay_in_a_row` left below the weights of gate and up.
        room_down: the same of down.

    Returns:
        (..., O), in the dtype of autocast where it is on, else that of x.
    """
    dtype = compute_dtype(x.device.type, x.dtype)
    x_NH = x.reshape(-1, x.shape[-1]).to(dtype)
    weights, state, layout, rows = _read_frozen(projections[:2])
    with torch.autocast(x.device.type, enabled=False):
        a_RH, (b_gate, b_up) = _read_adapters(projections[:2], rows, x_NH.shape[-1], x_NH)
        gul = torch.ops.axolotl.lora_project_apart(x_NH, weights, state, layout, _filled_up(a_RH), room)
        weights, state, layout, rows_down = _read_frozen(projections[2:])
        a_down, (b_down,) = _read_adapters(projections[2:], rows_down, rows[0], x_NH)
        y_NO, _ = torch.ops.axolotl.lora_down(
            gul, b_gate, b_up, weights, state, layout, a_down, b_down, room_down, act, _keeps_outputs()
        )
    kept = dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
    return y_NO.view(*x.shape[:-1], y_NO.shape[-1]).to(kept)
