"""LoRA projections as single autograd functions: less memory, fewer passes over activations.

    y = x W^T + b + s (x A^T) B^T          W, b frozen; A, B trained        https://arxiv.org/abs/2106.09685

What a function does that the modules of peft do not:
- projections that read the same x (q, k, v; gate, up) share one skinny matmul `x [A1; A2; ...]^T` and one of its gradient;
- the low-rank term is added inside the matmul (`addmm`), forward and backward, and no gradient of W is ever formed;
- the MLP keeps x, gate and up, and recomputes `act(gate) * up` in backward, in the memory of the incoming gradient;
- 4-bit weights are made dense once per pass and matrix, and freed before the next one: the caching allocator hands the
  same block to each, which makes it the one scratch buffer.

Matmuls run in the dtype of autocast where it is on, else in that of x; the gradients of A and B come in their own dtype.

Shape legend: B batch, T time, N tokens (B*T), H features in, O features out, r rank, R ranks of all projections of one input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from axolotl.kernels.fp8 import Fp8Linear
from axolotl.kernels.geglu import geglu_backward, geglu_forward, geglu_tanh_backward, geglu_tanh_forward
from axolotl.kernels.glu import Activation
from axolotl.kernels.lora_ops import mlp_in_graph, project_in_graph, project_rotated_in_graph, rotates_in_graph
from axolotl.kernels.quantize import dequantize
from axolotl.kernels.swiglu import swiglu_backward, swiglu_forward
from axolotl.kernels.utils import compute_dtype

Parameters = tuple[
    torch.Tensor, torch.Tensor | None, Any, torch.Tensor | None, torch.Tensor | None, float | None
]  # W, b, quant_state, A, B, s


def get_lora_parameters(proj: nn.Module) -> Parameters:
    """The tensors of a projection.

    Args:
        proj: a linear layer, with a LoRA adapter of peft or without.

    Returns:
        `(W, b, quant_state, A, B, s)`: W (O, H) or packed 4-bit, b (O,) or None, quant_state of W or None, A (r, H), B (O, r)
        and the factor of the adapter. A, B and s are None when there is no adapter, or it is switched off or merged into W.
    """
    layer: Any = proj  # the attributes of a layer of peft are not those that `nn.Module` declares
    base = layer.base_layer if hasattr(layer, "base_layer") else layer
    weight, bias = base.weight, base.bias
    quant_state = weight.fp8_state if isinstance(base, Fp8Linear) else getattr(weight, "quant_state", None)
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return weight, bias, quant_state, None, None, None
    active = layer.active_adapters[0] if hasattr(layer, "active_adapters") else layer.active_adapter
    if active not in layer.lora_A:
        return weight, bias, quant_state, None, None, None
    return weight, bias, quant_state, layer.lora_A[active].weight, layer.lora_B[active].weight, layer.scaling[active]


def matmul_lora(
    X: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    W_quant: Any,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    s: float | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`X W^T + b + s (X A^T) B^T`, differentiable by autograd when `out` is None.

    Args:
        X: (..., H).
        W: (O, H), or packed 4-bit weights with `W_quant`.
        b: (O,) or None.
        W_quant: quantization state of W, or None.
        A: (r, H) or None for no adapter.
        B: (O, r).
        s: factor of the adapter.
        out: (N, O) to write to, or None.

    Returns:
        (..., O) in the dtype of X.
    """
    dtype = X.dtype
    x_NH = X.reshape(-1, X.shape[-1])
    w_HO = dequantize(W.t(), W_quant).to(dtype)
    y_NO = torch.matmul(x_NH, w_HO, out=out)
    if A is not None:
        assert B is not None and s is not None
        low_Nr = x_NH @ A.t().to(dtype)
        y_NO = torch.addmm(y_NO, low_Nr, (s * B.t()).to(dtype), out=out)
    if b is not None:
        y_NO = torch.add(y_NO, b.to(dtype), out=out)
    return y_NO.view(*X.shape[:-1], y_NO.shape[-1])


# --- several projections of one input ---------------------------------------------------------------------------------


class _Projection(NamedTuple):
    """One projection inside a function: the arguments of `get_lora_parameters`, in its order."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    quant: Any
    A: torch.Tensor | None
    B: torch.Tensor | None
    scale: float | None


class _Kept(NamedTuple):
    """What backward needs of a group of projections, beside its input. Tensors are in the compute dtype.

    Attributes:
        weights: frozen weights, as they are stored.
        a_RH: the A matrices, one below the other, or None without adapters.
        b_Or: per projection with an adapter, `s B`.
        low_NR: `x A^T` of all adapters, or None.
    """

    weights: list[torch.Tensor]
    a_RH: torch.Tensor | None
    b_Or: list[torch.Tensor]
    low_NR: torch.Tensor | None


class _Plan(NamedTuple):
    """What backward needs of a projection that is no tensor."""

    quant: Any
    rank: int
    scale: float
    dtype_A: torch.dtype | None
    dtype_B: torch.dtype | None


def _read_plan(p: _Projection) -> _Plan:
    if p.A is None:
        return _Plan(p.quant, 0, 1.0, None, None)
    assert p.B is not None and p.scale is not None
    return _Plan(p.quant, p.A.shape[0], p.scale, p.A.dtype, p.B.dtype)


def _dense(weight: torch.Tensor, quant: Any, dtype: torch.dtype) -> torch.Tensor:
    """(O, H) in `dtype`; a temporary when the weight is stored in another form."""
    return dequantize(weight, quant).to(dtype)


def _read_dtype(x: torch.Tensor, projections: list[_Projection]) -> torch.dtype:
    """Autocast's dtype where it is on; else that of x, except that 4-bit layers take fp32 inputs down to their own."""
    quant = projections[0].quant
    own = x.dtype
    if quant is not None and x.dtype == torch.float32:
        own = quant[2] if isinstance(quant, (list, tuple)) else quant.dtype
    return compute_dtype(x.device.type, own)


def _project(x_NH: torch.Tensor, projections: list[_Projection]) -> tuple[list[torch.Tensor], _Kept]:
    """The outputs (N, O) of all projections of x, and what backward needs. Everything is in the dtype of x."""
    dtype = x_NH.dtype
    adapted = [p for p in projections if p.A is not None]
    a_RH = low_NR = None
    if adapted:
        stacked = adapted[0].A if len(adapted) == 1 else torch.cat([p.A for p in adapted])
        a_RH = stacked.to(dtype)
        low_NR = x_NH @ a_RH.t()
    outputs, b_Or, start = [], [], 0
    for p in projections:
        y_NO = F.linear(x_NH, _dense(p.weight, p.quant, dtype), None if p.bias is None else p.bias.to(dtype))
        if p.A is not None:
            assert p.B is not None and p.scale is not None and low_NR is not None
            rank = p.A.shape[0]
            scaled = (p.B * p.scale).to(dtype)
            y_NO.addmm_(low_NR[:, start : start + rank], scaled.t())
            b_Or.append(scaled)
            start += rank
        outputs.append(y_NO)
    return outputs, _Kept([p.weight for p in projections], a_RH, b_Or, low_NR)


def _project_backward(
    grads_NO: list[torch.Tensor], x_NH: torch.Tensor, kept: _Kept, plans: list[_Plan], need_x: bool
) -> tuple[torch.Tensor | None, list[tuple[torch.Tensor | None, torch.Tensor | None]]]:
    """The gradient of x (or None) and, per projection, those of A and B."""
    dtype = x_NH.dtype
    grads_B, grads_low, start = [], [], 0
    adapters = iter(kept.b_Or)
    for grad_NO, plan in zip(grads_NO, plans, strict=True):
        if not plan.rank:
            grads_B.append(None)
            continue
        assert kept.low_NR is not None
        grads_low.append(grad_NO @ next(adapters))
        low_Nr = kept.low_NR[:, start : start + plan.rank]
        grads_B.append((grad_NO.t() @ low_Nr).to(plan.dtype_B) * plan.scale)
        start += plan.rank
    grad_low_NR = None
    grads_A = [None] * len(plans)
    if grads_low:
        grad_low_NR = grads_low[0] if len(grads_low) == 1 else torch.cat(grads_low, dim=1)
        pieces = iter((grad_low_NR.t() @ x_NH).split([plan.rank for plan in plans if plan.rank]))
        grads_A = [next(pieces).to(plan.dtype_A) if plan.rank else None for plan in plans]
    grad_x = None
    if need_x:
        for grad_NO, weight, plan in zip(grads_NO, kept.weights, plans, strict=True):
            dense = _dense(weight, plan.quant, dtype)
            grad_x = grad_NO @ dense if grad_x is None else grad_x.addmm_(grad_NO, dense)
            del dense
        if grad_low_NR is not None:
            grad_x.addmm_(grad_low_NR, kept.a_RH)
    return grad_x, list(zip(grads_A, grads_B, strict=True))


def _flatten_kept(kept: _Kept) -> tuple[torch.Tensor | None, ...]:
    return (*kept.weights, kept.a_RH, kept.low_NR, *kept.b_Or)


def _unflatten_kept(tensors: tuple[torch.Tensor | None, ...], plans: list[_Plan]) -> _Kept:
    count = len(plans)
    return _Kept(list(tensors[:count]), tensors[count], list(tensors[count + 2 :]), tensors[count + 1])


def _num_kept(plans: list[_Plan]) -> int:
    return len(plans) + 2 + sum(plan.rank > 0 for plan in plans)


def _grads_of_arguments(grads: list[tuple[torch.Tensor | None, torch.Tensor | None]]) -> list[torch.Tensor | None]:
    """In the order of the arguments: W, b, quant, A, B, s."""
    return [grad for grad_A, grad_B in grads for grad in (None, None, None, grad_A, grad_B, None)]


def _forward_group(ctx, X: torch.Tensor, projections: list[_Projection]) -> tuple[torch.Tensor, ...]:
    dtype = _read_dtype(X, projections)
    with torch.autocast(X.device.type, enabled=False):
        x_NH = X.reshape(-1, X.shape[-1]).to(dtype)
        outputs, kept = _project(x_NH, projections)
    ctx.save_for_backward(x_NH, *_flatten_kept(kept))
    ctx.plans = [_read_plan(p) for p in projections]
    ctx.shape, ctx.dtype = X.shape, X.dtype
    return tuple(y_NO.view(*X.shape[:-1], y_NO.shape[-1]).to(_output_dtype(X, dtype)) for y_NO in outputs)


def _output_dtype(X: torch.Tensor, computed: torch.dtype) -> torch.dtype:
    return computed if torch.is_autocast_enabled(X.device.type) else X.dtype


def _backward_group(ctx, grads: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, ...]:
    x_NH, *kept = ctx.saved_tensors
    with torch.autocast(x_NH.device.type, enabled=False):
        grads_NO = [grad.reshape(-1, grad.shape[-1]).to(x_NH.dtype) for grad in grads]
        grad_x, grads_AB = _project_backward(
            grads_NO, x_NH, _unflatten_kept(tuple(kept), ctx.plans), ctx.plans, ctx.needs_input_grad[0]
        )
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
    return grad_x, *_grads_of_arguments(grads_AB)


class LoRA_QKV(torch.autograd.Function):
    """Query, key and value projections of one input."""

    @staticmethod
    def forward(
        ctx,
        X: torch.Tensor,
        q_weight: torch.Tensor,
        q_bias: torch.Tensor | None,
        q_quant: Any,
        q_A: torch.Tensor | None,
        q_B: torch.Tensor | None,
        q_scale: float | None,
        k_weight: torch.Tensor,
        k_bias: torch.Tensor | None,
        k_quant: Any,
        k_A: torch.Tensor | None,
        k_B: torch.Tensor | None,
        k_scale: float | None,
        v_weight: torch.Tensor,
        v_bias: torch.Tensor | None,
        v_quant: Any,
        v_A: torch.Tensor | None,
        v_B: torch.Tensor | None,
        v_scale: float | None,
        inplace: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """X (..., H) to Q, K, V (..., O). Weights and biases are frozen. `inplace` is accepted and changes nothing: X belongs to the caller, who may have kept it for other layers."""
        q_out, k_out, v_out = _forward_group(
            ctx,
            X,
            [
                _Projection(q_weight, q_bias, q_quant, q_A, q_B, q_scale),
                _Projection(k_weight, k_bias, k_quant, k_A, k_B, k_scale),
                _Projection(v_weight, v_bias, v_quant, v_A, v_B, v_scale),
            ],
        )
        return q_out, k_out, v_out

    @staticmethod
    @once_differentiable
    def backward(ctx, q_grad: torch.Tensor, k_grad: torch.Tensor, v_grad: torch.Tensor):
        """Gradients of X and of each A and B."""
        return *_backward_group(ctx, (q_grad, k_grad, v_grad)), None


class LoRA_O(torch.autograd.Function):
    """One projection: the output of attention, or any linear layer by itself."""

    @staticmethod
    def forward(
        ctx,
        X: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor | None,
        W_quant: Any,
        A: torch.Tensor | None,
        B: torch.Tensor | None,
        s: float | None,
    ) -> torch.Tensor:
        """X (..., H) to (..., O). W and b are frozen."""
        return _forward_group(ctx, X, [_Projection(W, b, W_quant, A, B, s)])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dY: torch.Tensor):
        """Gradients of X, A and B."""
        return _backward_group(ctx, (dY,))


class LoRA_MLP(torch.autograd.Function):
    """`down(act(gate(x)) * up(x))`, each projection with its adapter."""

    @staticmethod
    def forward(
        ctx,
        X: torch.Tensor,
        gate_weight: torch.Tensor,
        gate_bias: torch.Tensor | None,
        gate_quant: Any,
        gate_A: torch.Tensor | None,
        gate_B: torch.Tensor | None,
        gate_scale: float | None,
        up_weight: torch.Tensor,
        up_bias: torch.Tensor | None,
        up_quant: Any,
        up_A: torch.Tensor | None,
        up_B: torch.Tensor | None,
        up_scale: float | None,
        down_weight: torch.Tensor,
        down_bias: torch.Tensor | None,
        down_quant: Any,
        down_A: torch.Tensor | None,
        down_B: torch.Tensor | None,
        down_scale: float | None,
        activation_fn: Callable,
        activation_fn_backward: Callable,
        inplace: bool = True,
    ) -> torch.Tensor:
        """X (..., H) to (..., H).

        Args:
            activation_fn: `(gate, up) -> h`, such as `swiglu_forward`.
            activation_fn_backward: `(grad_h, gate, up) -> (h, grad_gate, grad_up)`, in place.
            inplace: backward may overwrite gate and up, which this function keeps for itself. A second backward through the
                same graph then raises; with False it works, and takes the memory of both once more.
        """
        first = [
            _Projection(gate_weight, gate_bias, gate_quant, gate_A, gate_B, gate_scale),
            _Projection(up_weight, up_bias, up_quant, up_A, up_B, up_scale),
        ]
        last = [_Projection(down_weight, down_bias, down_quant, down_A, down_B, down_scale)]
        dtype = _read_dtype(X, first)
        with torch.autocast(X.device.type, enabled=False):
            x_NH = X.reshape(-1, X.shape[-1]).to(dtype)
            (gate_NI, up_NI), kept_first = _project(x_NH, first)
            (y_NO,), kept_last = _project(activation_fn(gate_NI, up_NI), last)
        ctx.save_for_backward(x_NH, gate_NI, up_NI, *_flatten_kept(kept_first), *_flatten_kept(kept_last))
        ctx.first, ctx.last = [_read_plan(p) for p in first], [_read_plan(p) for p in last]
        ctx.shape, ctx.dtype = X.shape, X.dtype
        ctx.activation_fn_backward, ctx.inplace = activation_fn_backward, inplace
        return y_NO.view(*X.shape[:-1], y_NO.shape[-1]).to(_output_dtype(X, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        """Gradients of X and of each A and B."""
        x_NH, gate_NI, up_NI, *kept = ctx.saved_tensors
        split = _num_kept(ctx.first)
        first = _unflatten_kept(tuple(kept[:split]), ctx.first)
        last = _unflatten_kept(tuple(kept[split:]), ctx.last)
        with torch.autocast(x_NH.device.type, enabled=False):
            if not ctx.inplace:
                gate_NI, up_NI = gate_NI.clone(), up_NI.clone()
            grad_NO = grad_output.reshape(-1, grad_output.shape[-1]).to(x_NH.dtype)
            grad_low_Nr = grad_B = grad_A = None
            (plan,) = ctx.last
            if plan.rank:
                assert last.low_NR is not None
                grad_low_Nr = grad_NO @ last.b_Or[0]
                grad_B = (grad_NO.t() @ last.low_NR).to(plan.dtype_B) * plan.scale
            grad_h_NI = grad_NO @ _dense(last.weights[0], plan.quant, x_NH.dtype)
            if plan.rank:
                grad_h_NI.addmm_(grad_low_Nr, last.a_RH)
            h_NI, grad_gate_NI, grad_up_NI = ctx.activation_fn_backward(grad_h_NI, gate_NI, up_NI)
            if plan.rank:
                grad_A = (grad_low_Nr.t() @ h_NI).to(plan.dtype_A)
            del h_NI, grad_h_NI
            grad_x, grads_first = _project_backward(
                [grad_gate_NI, grad_up_NI], x_NH, first, ctx.first, ctx.needs_input_grad[0]
            )
            if grad_x is not None:
                grad_x = grad_x.view(ctx.shape).to(ctx.dtype)
        return grad_x, *_grads_of_arguments([*grads_first, (grad_A, grad_B)]), None, None, None


class LoRA_Embedding(torch.autograd.Function):
    """`W[ids] + s A^T[ids] B^T`: an embedding with an adapter. The gradient of A touches only the rows that were read."""

    @staticmethod
    def forward(
        ctx,
        ids: torch.Tensor,
        weight: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        s: float,
        padding_idx: int | None = None,
    ) -> torch.Tensor:
        """ids (...) int64 to (..., H). weight (V, H) is frozen, A (r, V), B (H, r). `padding_idx` gets no gradient in A."""
        flat_N = ids.reshape(-1)
        with torch.autocast(ids.device.type, enabled=False):
            low_Nr = A.t().index_select(0, flat_N)
            scaled_Hr = B * s
            y_NH = weight.index_select(0, flat_N)
            y_NH.addmm_(low_Nr.to(y_NH.dtype), scaled_Hr.t().to(y_NH.dtype))
        ctx.save_for_backward(flat_N, low_Nr, scaled_Hr)
        ctx.scale, ctx.padding_idx, ctx.num_rows = s, padding_idx, A.shape[1]
        return y_NH.view(*ids.shape, y_NH.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        """Gradients of A and B."""
        flat_N, low_Nr, scaled_Hr = ctx.saved_tensors
        with torch.autocast(grad_output.device.type, enabled=False):
            grad_NH = grad_output.reshape(-1, grad_output.shape[-1]).to(low_Nr.dtype)
            grad_low_Nr = grad_NH @ scaled_Hr
            grad_B = (grad_NH.t() @ low_Nr) * ctx.scale
            if ctx.padding_idx is not None:
                grad_low_Nr = grad_low_Nr.masked_fill((flat_N == ctx.padding_idx)[:, None], 0.0)
            grad_A = low_Nr.new_zeros(ctx.num_rows, low_Nr.shape[1]).index_add_(0, flat_N, grad_low_Nr).t()
        return None, None, grad_A, grad_B, None, None


# --- modules ----------------------------------------------------------------------------------------------------------


def why_not_fused(proj: nn.Module) -> str | None:
    """Why a projection must run as its module does, or None when the functions above compute the same.

    Asked at every forward, because adapters, training mode, hooks and frozen weights can change at any time.
    """
    layer: Any = proj  # see `get_lora_parameters`
    base = layer.base_layer if hasattr(layer, "base_layer") else layer
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "hooks watch the layer"
    weight, bias = base.weight, base.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "its base weight or bias is trained too"
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return "its weight is in a layout for inference"
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return None if not active else "several adapters are active"
    name = active[0]
    if name in layer.lora_variant:
        return f"its adapter is a {type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')}"
    if layer.lora_bias.get(name):
        return "its adapter has a bias"
    dropout = layer.lora_dropout[name]
    if layer.training and getattr(dropout, "p", 0.0) > 0.0:
        return "its adapter has dropout, which each projection draws by itself"
    return None


def _runs_as_operators(projections: tuple[nn.Module, ...]) -> bool:
    """Whether the operators of `lora_ops` compute these projections: under `torch.compile`, and for weights in fp8."""
    return torch.compiler.is_compiling() or any(
        isinstance(getattr(proj, "base_layer", proj), Fp8Linear) for proj in projections
    )


_ACTIVATIONS: dict[Callable, Activation] = {
    swiglu_forward: "silu",
    geglu_forward: "gelu",
    geglu_tanh_forward: "gelu_tanh",
}


def _mlp(self, X, plain_act, activation_fn, activation_fn_backward, inplace):
    projections = (self.gate_proj, self.up_proj, self.down_proj)
    if any(map(why_not_fused, projections)):
        return self.down_proj(plain_act(self.gate_proj(X)) * self.up_proj(X))
    if _runs_as_operators(projections):
        gate, up, down = (get_lora_parameters(proj) for proj in projections)
        if gate[1] is up[1] is down[1] is None:
            rooms = getattr(self, "adapter_room", 0), getattr(self, "adapter_room_down", 0)
            return mlp_in_graph(X, [gate, up, down], _ACTIVATIONS[activation_fn], *rooms)
        y_gate, y_up = project_in_graph(X, [gate, up])
        return project_in_graph(plain_act(y_gate) * y_up, [down])[0]
    parameters = [value for proj in projections for value in get_lora_parameters(proj)]
    return LoRA_MLP.apply(X, *parameters, activation_fn, activation_fn_backward, inplace)


def apply_lora_mlp_swiglu(self: nn.Module, X: torch.Tensor, inplace: bool = True) -> torch.Tensor:
    """Forward of an MLP with SwiGLU. `self` has `gate_proj`, `up_proj` and `down_proj`; X is (..., H)."""
    return _mlp(self, X, F.silu, swiglu_forward, swiglu_backward, inplace)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def apply_lora_mlp_geglu(self: nn.Module, X: torch.Tensor, inplace: bool = True) -> torch.Tensor:
    """Forward of an MLP with GEGLU: the exact GELU, or its tanh approximation where `self.gelu_approximate == "tanh"`."""
    if getattr(self, "gelu_approximate", "none") == "tanh":
        return _mlp(self, X, _gelu_tanh, geglu_tanh_forward, geglu_tanh_backward, inplace)
    return _mlp(self, X, F.gelu, geglu_forward, geglu_backward, inplace)


def apply_lora_qkv(
    self: nn.Module, X: torch.Tensor, inplace: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of an attention with `q_proj`, `k_proj` and `v_proj`; X is (..., H)."""
    projections = (self.q_proj, self.k_proj, self.v_proj)
    if any(map(why_not_fused, projections)):
        return self.q_proj(X), self.k_proj(X), self.v_proj(X)
    if _runs_as_operators(projections):
        query, key, value = project_in_graph(X, [get_lora_parameters(proj) for proj in projections])
        return query, key, value
    parameters = [value for proj in projections for value in get_lora_parameters(proj)]
    return LoRA_QKV.apply(X, *parameters, inplace)


def apply_lora_qkv_rotated(
    self: nn.Module, X: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Queries and keys with their positions, and values, in compiled layers; None where they are better computed one by one.

    Args:
        self: an attention with `q_proj`, `k_proj`, `v_proj` and `head_dim`.
        X: (B, T, H).
        cos: (B, T, D) or (1, T, D), D features of a head.
        sin: as `cos`.

    Returns:
        Queries and keys (B, T, heads, D), and values (B, T, O).
    """
    projections = (self.q_proj, self.k_proj, self.v_proj)
    if not torch.compiler.is_compiling() or any(map(why_not_fused, projections)):
        return None
    parameters = [get_lora_parameters(proj) for proj in projections]
    ranks = tuple(0 if A is None else A.shape[0] for _, _, _, A, _, _ in parameters)
    if not rotates_in_graph(X, ranks, self.head_dim, cos, sin):
        return None
    return project_rotated_in_graph(X, parameters, cos, sin, getattr(self, "adapter_room", 0))


def apply_lora_o(self: nn.Module, X: torch.Tensor) -> torch.Tensor:
    """The output projection of an attention with `o_proj`; X is (..., H)."""
    if why_not_fused(self.o_proj):
        return self.o_proj(X)
    if _runs_as_operators((self.o_proj,)):
        return project_in_graph(X, [get_lora_parameters(self.o_proj)], getattr(self, "adapter_room_o", 0))[0]
    return LoRA_O.apply(X, *get_lora_parameters(self.o_proj))


def apply_lora_embedding(self: nn.Module, X: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Forward of an embedding of peft; X are ids. `self._original_forward` runs what this function does not compute."""
    layer: Any = self  # see `get_lora_parameters`
    fused = (
        not args and not kwargs and not layer.disable_adapters and not layer.merged and len(layer.active_adapters) == 1
    )
    name = layer.active_adapters[0] if layer.active_adapters else ""
    if (
        not fused
        or name not in layer.lora_embedding_A
        or name in layer.lora_variant
        or layer.base_layer.weight.requires_grad
    ):
        return layer._original_forward(X, *args, **kwargs)
    base = layer.base_layer
    return LoRA_Embedding.apply(
        X,
        base.weight,
        layer.lora_embedding_A[name],
        layer.lora_embedding_B[name],
        layer.scaling[name],
        base.padding_idx,
    )
