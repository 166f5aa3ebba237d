"""Gated activations: `h = act(gate) * up`, and backward in the memory of its inputs.

One Triton kernel per direction serves SiLU and both GELUs; `swiglu` and `geglu` give them their documented names.
Backward recomputes `h` (the weight gradient of the next layer needs it), so that forward need not keep it. Values are
computed in fp32 (fp64 stays fp64) and rounded once. See "GLU Variants Improve Transformer",
https://arxiv.org/abs/2002.05202, and for the GELUs https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.autograd.function import once_differentiable

from axolotl.kernels.utils import BLOCK, jit, num_programs, runs_triton, sigmoid, tl

Activation = Literal["silu", "gelu", "gelu_tanh"]

_TANH_SCALE = math.sqrt(2.0 / math.pi)
_TANH_CUBIC = 0.044715


@jit
def _act_and_slope(g, ACT: tl.constexpr):
    """act(g) and its derivative, fp32."""
    if ACT == "silu":
        gate = sigmoid(g)
        act = g * gate
        slope = gate + act * (1.0 - gate)
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        act = g * cdf
        slope = cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        # 0.5 (1 + tanh(z)) = sigmoid(2 z), without the cancellation at large negative z.
        gate = sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        act = g * gate
        slope = gate + act * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    return act, slope


@jit
def _forward_kernel(gate_ptr, up_ptr, h_ptr, n, ACT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    act, _ = _act_and_slope(gate, ACT)
    tl.store(h_ptr + offsets, (act * up).to(h_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    grad_ptr, gate_ptr, up_ptr, h_out, gate_out, up_out, n, ACT: tl.constexpr, WRITE_H: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The outputs may lie in the memory of the inputs."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    act, slope = _act_and_slope(gate, ACT)
    if WRITE_H:
        tl.store(h_out + offsets, (act * up).to(h_out.dtype.element_ty), mask=inside)
    tl.store(gate_out + offsets, (grad * up * slope).to(gate_out.dtype.element_ty), mask=inside)
    tl.store(up_out + offsets, (grad * act).to(up_out.dtype.element_ty), mask=inside)


def _act_and_slope_torch(g: torch.Tensor, act: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    if act == "silu":
        sigmoid = torch.sigmoid(g)
        return g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
    if act == "gelu":
        cdf = 0.5 * (1 + torch.erf(g / math.sqrt(2.0)))
        return g * cdf, cdf + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    # 0.5 (1 + tanh(z)) = sigmoid(2 z), without the cancellation at large negative z.
    gate = torch.sigmoid(2 * _TANH_SCALE * (g + _TANH_CUBIC * g**3))
    return g * gate, gate + g * gate * (1 - gate) * 2 * _TANH_SCALE * (1 + 3 * _TANH_CUBIC * g**2)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def gated_forward(gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
    """`act(gate) * up`.

    Args:
        gate: any shape, floating point.
        up: same shape.
        act: the activation.

    Returns:
        A new tensor of the shape and dtype of `gate`.
    """
    if not runs_triton(gate, up) or gate.dtype == torch.float64:
        h = _act_and_slope_torch(_wide(gate), act)[0] * _wide(up)
        # PyTorch 2.11 gives zero gradients where a traced `autograd.Function` returns a `to` that does nothing.
        return h if h.dtype == gate.dtype else h.to(gate.dtype)
    h = torch.empty_like(gate)
    if gate.numel():
        with torch.cuda.device(gate.device):
            _forward_kernel[num_programs(gate.numel())](gate, up, h, gate.numel(), ACT=act, BLOCK=BLOCK)
    return h


def gated_backward(
    grad_output: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: Activation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `gated_forward`, written over all three inputs.

    Args:
        grad_output: gradient of `h`, any shape; becomes `h`.
        gate: same shape; becomes its own gradient.
        up: same shape; becomes its own gradient.
        act: the activation.

    Returns:
        `(h, grad_gate, grad_up)`: the memory of `grad_output`, `gate` and `up`, in this order.
    """
    if runs_triton(grad_output, gate, up) and gate.dtype != torch.float64:
        if gate.numel():
            with torch.cuda.device(gate.device):
                _backward_kernel[num_programs(gate.numel())](
                    grad_output, gate, up, grad_output, gate, up, gate.numel(), ACT=act, WRITE_H=True, BLOCK=BLOCK
                )
        # PyTorch does not see what Triton writes; without this a second backward would read the gradients as inputs.
        for tensor in (grad_output, gate, up):
            torch.autograd.graph.increment_version(tensor)
        return grad_output, gate, up
    grad, wide_up = _wide(grad_output), _wide(up)
    value, slope = _act_and_slope_torch(_wide(gate), act)
    h, grad_gate, grad_up = value * wide_up, grad * wide_up * slope, grad * value
    return grad_output.copy_(h), gate.copy_(grad_gate), up.copy_(grad_up)


def gated(gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
    """`gated_forward` for autograd: of all that it computes, backward gets `gate` and `up` alone.

    Args:
        gate: any shape, floating point.
        up: same shape.
        act: the activation.
    """
    return _Gated.apply(gate, up, act)


class _Gated(torch.autograd.Function):
    """Backward writes new tensors, so that it may run twice and nobody else's gradient changes."""

    @staticmethod
    def forward(ctx, gate, up, act):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return gated_forward(gate, up, act)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        gate, up = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        if not runs_triton(grad_output, gate, up) or gate.dtype == torch.float64:
            _, grad_gate, grad_up = gated_backward(grad_output.clone(), gate.clone(), up.clone(), ctx.act)
            return grad_gate, grad_up, None
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        if gate.numel():
            with torch.cuda.device(gate.device):
                _backward_kernel[num_programs(gate.numel())](
                    grad_output, gate, up, grad_output, grad_gate, grad_up, gate.numel(),
                    ACT=ctx.act, WRITE_H=False, BLOCK=BLOCK,
                )  # fmt: skip
        return grad_gate, grad_up, None
