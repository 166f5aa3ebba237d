"""LoRA projections inside `torch.compile`: one opaque operator for the projections of one input, one for their gradient.

    y_i = x W_i^T + (x A_i^T) (s_i B_i)^T

The compiler fuses norms, activations and residuals around the operators, decides what of those to keep for backward, and
cannot move what happens inside: dense copies of quantized weights live as long as one matmul. The functions of
`axolotl.kernels.lora` are what runs without the compiler; PyTorch 2.11 gives traced `autograd.Function`s zero gradients
for parameters that they read from modules.

Shape legend: N tokens, H features in, O features out, r rank, R ranks of all projections.
"""

from __future__ import annotations

from typing import Any

import torch

from axolotl.kernels.fp8 import matmul_fp8, quantize_rows
from axolotl.kernels.glu import Activation
from axolotl.kernels.lora_glu import lora_gated_backward, lora_gated_forward
from axolotl.kernels.quantize import NUM_STATE_TENSORS, dequantize_parts, split_state
from axolotl.kernels.utils import compute_dtype

Projection = tuple[Any, ...]  # what `get_lora_parameters` returns


class _Factor:
    """A factor of several matmuls (N, K), and its fp8 form once one of them asks."""

    def __init__(self, dense: torch.Tensor):
        self.dense = dense
        self._fp8: tuple[torch.Tensor, torch.Tensor] | None = None

    def fp8(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, K) e4m3 and (N, 1) fp32."""
        if self._fp8 is None:
            self._fp8 = quantize_rows(self.dense)
        return self._fp8


class _Weights:
    """The frozen weights of an operator, each given dense when its matmul comes.

    Args:
        weights: as they are stored, (O, H) or packed.
        state: what their quantization states hold, without the absent tensors, one after the other.
        layout: per weight, the numbers of its quantization state, then which of its tensors are present, as bits.
    """

    def __init__(self, weights: list[torch.Tensor], state: list[torch.Tensor], layout: list[int]):
        self.stored = weights
        self.states: list[tuple[list[torch.Tensor | None], list[int]] | None] = []
        each = len(layout) // len(weights)
        tensors = iter(state)
        for start in range(0, len(layout), each):
            *numbers, present = layout[start : start + each]
            own = [next(tensors) if present >> bit & 1 else None for bit in range(NUM_STATE_TENSORS)]
            self.states.append((own, numbers) if present else None)

    def _fp8(self, index: int) -> list[torch.Tensor | None] | None:
        """The tensors of `Fp8State`, or None when the weight is not in fp8."""
        state = self.states[index]
        return state[0] if state is not None and state[1][2] == 0 else None

    def _dense(self, index: int, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """(O, H) in `dtype`: the weight itself, or a temporary (`out`, if given) when it is stored in four bits."""
        state = self.states[index]
        if state is None:
            return self.stored[index].to(dtype)
        return dequantize_parts(self.stored[index], *state, dtype, out)

    def product(self, x: _Factor, index: int) -> torch.Tensor:
        """`x W^T` (N, O)."""
        fp8 = self._fp8(index)
        if fp8 is None:
            return x.dense @ self._dense(index, x.dense.dtype).t()
        return matmul_fp8(*x.fp8(), self.stored[index], fp8[0], x.dense.dtype)

    def add_product_back(self, grad_x: torch.Tensor, grad: torch.Tensor, index: int) -> torch.Tensor:
        """`grad_x + grad W` (N, H), in the memory of `grad_x`."""
        fp8 = self._fp8(index)
        if fp8 is None:
            return grad_x.addmm_(grad, self._dense(index, grad.dtype))
        return grad_x.add_(matmul_fp8(*quantize_rows(grad), fp8[1], fp8[2], grad.dtype))

    def product_back(self, grad: torch.Tensor, index: int) -> torch.Tensor:
        """`grad W` (N, H)."""
        fp8 = self._fp8(index)
        if fp8 is None:
            return grad @ self._dense(index, grad.dtype)
        return matmul_fp8(*quantize_rows(grad), fp8[1], fp8[2], grad.dtype)

    def products(self, x: torch.Tensor) -> torch.Tensor:
        """`[x W_0^T, x W_1^T]` (N, O_0 + O_1)."""
        if (fp8 := self._fp8(0)) is not None:
            other = self._fp8(1)
            assert other is not None
            scale = torch.cat([fp8[0], other[0]], dim=1)
            return matmul_fp8(*quantize_rows(x), self._stacked_memory(), scale, x.dtype)
        both = self._stacked(x.dtype)
        if both is not None:
            return x @ both.t()
        first, second = self._dense(0, x.dtype), self._dense(1, x.dtype)
        products = x.new_empty(x.shape[0], first.shape[0] + second.shape[0])
        torch.mm(x, first.t(), out=products[:, : first.shape[0]])
        torch.mm(x, second.t(), out=products[:, first.shape[0] :])
        return products

    def products_back(self, grad: torch.Tensor) -> torch.Tensor:
        """`grad [W_0; W_1]` (N, H) for a gradient (N, O_0 + O_1)."""
        if (fp8 := self._fp8(0)) is not None:
            return matmul_fp8(*quantize_rows(grad), fp8[1], fp8[2], grad.dtype)
        both = self._stacked(grad.dtype)
        if both is not None:
            return grad @ both
        first = self._dense(0, grad.dtype)
        return (grad[:, : first.shape[0]] @ first).addmm_(grad[:, first.shape[0] :], self._dense(1, grad.dtype))

    def _stacked(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Both weights as (O_0 + O_1, H), or None when that would take a copy of dense ones."""
        states = self.states
        if states[0] is not None and states[1] is not None:
            rows = [state[1][0] for state in states if state is not None]
            both = torch.empty(sum(rows), states[0][1][1], dtype=dtype, device=self.stored[0].device)
            self._dense(0, dtype, both[: rows[0]])
            self._dense(1, dtype, both[rows[0] :])
            return both
        one, other = self.stored
        beside = (
            states == [None, None]
            and one.dtype == other.dtype == dtype
            and one.is_contiguous()
            and other.is_contiguous()
            and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
            and other.storage_offset() == one.storage_offset() + one.numel()
        )
        return self._stacked_memory() if beside else None

    def _stacked_memory(self) -> torch.Tensor:
        """Both stored weights, which lie one behind the other, as one."""
        one, other = self.stored
        return one.as_strided((one.shape[0] + other.shape[0], one.shape[1]), one.stride())


@torch.library.custom_op(
    "axolotl::lora_project",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] state, int[] layout, Tensor a, Tensor[] b) -> Tensor[]",
)
def _project(x, weights, state, layout, a, b):
    """The outputs (N, O_i), then `x A^T` (N, R)."""
    frozen = _Weights(weights, state, layout)
    low_NR, factor = x @ a.t(), _Factor(x)
    outputs, start = [], 0
    for index, b_Or in enumerate(b):
        y_NO = frozen.product(factor, index)
        rank = b_Or.shape[1]
        if rank:
            y_NO.addmm_(low_NR[:, start : start + rank], b_Or.t())
        start += rank
        outputs.append(y_NO)
    return [*outputs, low_NR]


@_project.register_fake
def _(x, weights, state, layout, a, b):
    return [*(x.new_empty(x.shape[0], b_Or.shape[0]) for b_Or in b), x.new_empty(x.shape[0], a.shape[0])]


@torch.library.custom_op(
    "axolotl::lora_project_backward",
    mutates_args=(),
    schema="(Tensor[] grads, Tensor x, Tensor[] weights, Tensor[] state, int[] layout, Tensor a, Tensor[] b, "
    "Tensor low, bool need_x) -> Tensor[]",
)
def _project_backward(grads, x, weights, state, layout, a, b, low, need_x):
    """The gradients of x (empty unless asked for), of a (R, H), then of each b (O_i, r_i)."""
    frozen = _Weights(weights, state, layout)
    grad_low_NR = torch.empty_like(low)
    grads_b, start = [], 0
    for grad_NO, b_Or in zip(grads, b, strict=True):
        part = slice(start, start + b_Or.shape[1])
        grads_b.append(grad_NO.t() @ low[:, part])
        torch.mm(grad_NO, b_Or, out=grad_low_NR[:, part])
        start = part.stop
    grad_a_RH = grad_low_NR.t() @ x
    grad_x = x.new_empty(0)
    if need_x:
        grad_x = grad_low_NR @ a
        for index, grad_NO in enumerate(grads):
            frozen.add_product_back(grad_x, grad_NO, index)
    return [grad_x, grad_a_RH, *grads_b]


@_project_backward.register_fake
def _(grads, x, weights, state, layout, a, b, low, need_x):
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    return [grad_x, torch.empty_like(a), *(torch.empty_like(b_Or) for b_Or in b)]


def _keep(ctx, inputs, output):
    x, weights, state, layout, a, b = inputs
    ctx.save_for_backward(x, a, output[-1], *b, *weights, *state)
    ctx.count, ctx.layout = len(b), layout
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grads):
    x, a, low, *rest = ctx.saved_tensors
    b, weights, state = rest[: ctx.count], rest[ctx.count : 2 * ctx.count], rest[2 * ctx.count :]
    outputs = [
        x.new_zeros(x.shape[0], b_Or.shape[0]) if grad is None else grad.contiguous()
        for grad, b_Or in zip(grads[: ctx.count], b, strict=True)
    ]
    need_x = ctx.needs_input_grad[0]
    grad_x, grad_a, *grads_b = torch.ops.axolotl.lora_project_backward(
        outputs, x, weights, state, ctx.layout, a, b, low, need_x
    )
    return grad_x if need_x else None, [None] * ctx.count, [None] * len(state), None, grad_a, grads_b


_project.register_autograd(_differentiate, setup_context=_keep)


# --- the MLP: gate and up side by side, then the activation with down ---------------------------------------------------
#
# Two operators, so that a recomputed layer (gradient checkpointing) can leave the second one out: nothing needs its output.


@torch.library.custom_op(
    "axolotl::lora_gate_up",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor[] state, int[] layout, Tensor a) -> (Tensor, Tensor)",
)
def _gate_up(x, weights, state, layout, a):
    """Gate and up (N, 2 I) without their low-rank terms, and `x A^T` of both (N, R)."""
    return _Weights(weights, state, layout).products(x), x @ a.t()


def _num_rows(weights: list[torch.Tensor], layout: list[int]) -> int:
    """Output features of all weights of an operator together."""
    each = len(layout) // len(weights)
    return sum(layout[index * each] or weight.shape[0] for index, weight in enumerate(weights))


@_gate_up.register_fake
def _(x, weights, state, layout, a):
    return x.new_empty(x.shape[0], _num_rows(weights, layout)), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op(
    "axolotl::lora_gate_up_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor grad_low, Tensor x, Tensor[] weights, Tensor[] state, int[] layout, Tensor a, bool need_x) "
    "-> (Tensor, Tensor)",
)
def _gate_up_backward(grad, grad_low, x, weights, state, layout, a, need_x):
    """The gradients of x (empty unless asked for) and of a."""
    grad_a = grad_low.t() @ x
    if not need_x:
        return x.new_empty(0), grad_a
    grad_x = _Weights(weights, state, layout).products_back(grad)
    return grad_x.addmm_(grad_low, a), grad_a


@_gate_up_backward.register_fake
def _(grad, grad_low, x, weights, state, layout, a, need_x):
    return torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(a)


def _keep_gate_up(ctx, inputs, output):
    x, weights, state, layout, a = inputs
    ctx.save_for_backward(x, a, *weights, *state)
    ctx.count, ctx.layout = len(weights), layout


def _differentiate_gate_up(ctx, grad, grad_low):
    x, a, *rest = ctx.saved_tensors
    weights, state = rest[: ctx.count], rest[ctx.count :]
    need_x = ctx.needs_input_grad[0]
    grad_x, grad_a = torch.ops.axolotl.lora_gate_up_backward(
        grad.contiguous(), grad_low.contiguous(), x, weights, state, ctx.layout, a, need_x
    )
    return grad_x if need_x else None, [None] * len(weights), [None] * len(state), None, grad_a


_gate_up.register_autograd(_differentiate_gate_up, setup_context=_keep_gate_up)


@torch.library.custom_op(
    "axolotl::lora_down",
    mutates_args=(),
    schema="(Tensor gu, Tensor low, Tensor b_gate, Tensor b_up, Tensor[] weights, Tensor[] state, int[] layout, "
    "Tensor a, Tensor b, str act) -> Tensor",
)
def _down(gu, low, b_gate, b_up, weights, state, layout, a, b, act):
    """`h W^T + (h A^T) b^T` (N, O) with `h = act(gate) * up`; gate and up get their low-rank terms here."""
    h_NI = lora_gated_forward(gu, low, b_gate, b_up, act)
    y_NO = _Weights(weights, state, layout).product(_Factor(h_NI), 0)
    return y_NO.addmm_(h_NI @ a.t(), b.t()) if b.shape[1] else y_NO


@_down.register_fake
def _(gu, low, b_gate, b_up, weights, state, layout, a, b, act):
    return gu.new_empty(gu.shape[0], b.shape[0])


@torch.library.custom_op(
    "axolotl::lora_down_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor gu, Tensor low, Tensor b_gate, Tensor b_up, Tensor[] weights, Tensor[] state, int[] layout, "
    "Tensor a, Tensor b, str act) -> Tensor[]",
)
def _down_backward(grad, gu, low, b_gate, b_up, weights, state, layout, a, b, act):
    """The gradients of gu, low, b_gate, b_up, a and b."""
    size, rank = b_gate.shape
    h_NI = _Weights(weights, state, layout).product_back(grad, 0)  # its gradient, until the activation puts h there
    grad_low_Nr = grad @ b
    grad_gu = lora_gated_backward(h_NI, gu, low, b_gate, b_up, grad_low_Nr, a.t().contiguous(), act)
    grad_a = grad_low_Nr.t() @ h_NI
    grad_b = grad.t() @ (h_NI @ a.t())
    del h_NI
    grad_gate, grad_up = grad_gu[:, :size], grad_gu[:, size:]
    grad_low = torch.empty_like(low)
    torch.mm(grad_gate, b_gate, out=grad_low[:, :rank])
    torch.mm(grad_up, b_up, out=grad_low[:, rank:])
    return [grad_gu, grad_low, grad_gate.t() @ low[:, :rank], grad_up.t() @ low[:, rank:], grad_a, grad_b]


@_down_backward.register_fake
def _(grad, gu, low, b_gate, b_up, weights, state, layout, a, b, act):
    return [torch.empty_like(tensor) for tensor in (gu, low, b_gate, b_up, a, b)]


def _keep_down(ctx, inputs, output):
    gu, low, b_gate, b_up, weights, state, layout, a, b, act = inputs
    ctx.save_for_backward(gu, low, b_gate, b_up, a, b, *weights, *state)
    ctx.layout, ctx.act = layout, act


def _differentiate_down(ctx, grad):
    gu, low, b_gate, b_up, a, b, weight, *state = ctx.saved_tensors
    grad_gu, grad_low, grad_gate, grad_up, grad_a, grad_b = torch.ops.axolotl.lora_down_backward(
        grad.contiguous(), gu, low, b_gate, b_up, [weight], state, ctx.layout, a, b, ctx.act
    )
    return grad_gu, grad_low, grad_gate, grad_up, [None], [None] * len(state), None, grad_a, grad_b, None


_down.register_autograd(_differentiate_down, setup_context=_keep_down)


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


def project_in_graph(x: torch.Tensor, projections: list[Projection]) -> list[torch.Tensor]:
    """All projections of one input, for use under `torch.compile`.

    Args:
        x: (..., H).
        projections: per projection `(W, b, quant_state, A, B, s)` as `get_lora_parameters` gives them; W and b are frozen.

    Returns:
        Per projection (..., O), in the dtype of autocast where it is on, else that of x.
    """
    dtype = compute_dtype(x.device.type, x.dtype)
    x_NH = x.reshape(-1, x.shape[-1]).to(dtype)
    weights, state, layout, rows = _read_frozen(projections)
    with torch.autocast(x.device.type, enabled=False):
        a_RH, b_Or = _read_adapters(projections, rows, x_NH.shape[-1], x_NH)
        outputs = torch.ops.axolotl.lora_project(x_NH, weights, state, layout, a_RH, b_Or)[:-1]
        biases = [bias for _, bias, *_ in projections]
        outputs = [y if bias is None else y + bias.to(dtype) for y, bias in zip(outputs, biases, strict=True)]
    kept = dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
    return [y.view(*x.shape[:-1], y.shape[-1]).to(kept) for y in outputs]


def mlp_in_graph(x: torch.Tensor, projections: list[Projection], act: Activation) -> torch.Tensor:
    """`down(act(gate(x)) * up(x))`, for use under `torch.compile`.

    Args:
        x: (..., H).
        projections: gate, up and down, as in `project_in_graph`, without biases.
        act: the activation.

    Returns:
        (..., O), in the dtype of autocast where it is on, else that of x.
    """
    dtype = compute_dtype(x.device.type, x.dtype)
    x_NH = x.reshape(-1, x.shape[-1]).to(dtype)
    weights, state, layout, rows = _read_frozen(projections[:2])
    with torch.autocast(x.device.type, enabled=False):
        a_RH, (b_gate, b_up) = _read_adapters(projections[:2], rows, x_NH.shape[-1], x_NH)
        gu_NI, low_NR = torch.ops.axolotl.lora_gate_up(x_NH, weights, state, layout, a_RH)
        weights, state, layout, rows_down = _read_frozen(projections[2:])
        a_down, (b_down,) = _read_adapters(projections[2:], rows_down, rows[0], x_NH)
        y_NO = torch.ops.axolotl.lora_down(gu_NI, low_NR, b_gate, b_up, weights, state, layout, a_down, b_down, act)
    kept = dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
    return y_NO.view(*x.shape[:-1], y_NO.shape[-1]).to(kept)


def lay_side_by_side(first: torch.nn.Parameter, second: torch.nn.Parameter) -> None:
    """Give two dense weights of one shape and dtype one memory, so that both multiply in one matmul."""
    both = torch.cat([first.data, second.data])
    first.data, second.data = both[: first.shape[0]], both[first.shape[0] :]
