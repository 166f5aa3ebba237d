"""Matmuls with frozen weights in 8-bit floating point (e4m3), one scale per row of each factor.

    y = x W^T:   x per token, W per output feature        dx = dy W:   dy per token, W per input feature

A weight is kept twice, as (O, H) and as (H, O), because the matrix units read both factors along the axis that is summed; two
bytes for each weight, as in bf16. Activations and gradients are scaled by the largest value of each token, so that one
token with outliers does not cost the others their digits (section 3 of https://arxiv.org/abs/2209.05433 for the format).

Weights that train multiply in fp8 too: `axolotl.kernels.fp8_linear`.

Shape legend: N tokens, H features in, O features out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from axolotl.kernels.utils import jit, runs_triton, tl

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 1e-12
"""Values are scaled as if the largest were at least this, so that zeros have a scale."""
MULTIPLE = 16
"""Both sizes of a weight must be multiples of it."""


class Fp8State(NamedTuple):
    """What belongs to a weight (O, H) in fp8.

    Attributes:
        scale: (1, O) fp32, the factor of each row.
        transposed: (H, O') fp8, the weight the other way round, quantized for itself; O' is larger when it is stacked with others.
        scale_transposed: (1, H) fp32.
    """

    scale: torch.Tensor
    transposed: torch.Tensor
    scale_transposed: torch.Tensor


@jit
def _quantize_kernel(x_ptr, out_ptr, scale_ptr, num_columns, stride, BLOCK: tl.constexpr):
    """One row per program, read twice: the second time it comes from cache."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_columns, BLOCK):
        at = start + columns
        x = tl.load(x_ptr + row * stride + at, mask=at < num_columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.maximum(tl.max(largest, axis=0), 1e-12) / 448.0
    tl.store(scale_ptr + row, scale)
    for start in range(0, num_columns, BLOCK):
        at = start + columns
        x = tl.load(x_ptr + row * stride + at, mask=at < num_columns, other=0.0).to(tl.float32) / scale
        inside = tl.minimum(tl.maximum(x, -448.0), 448.0)
        x = tl.where(x == x, inside, x)  # NaN, which minimum and maximum make a number of
        tl.store(out_ptr + row * num_columns + at, x.to(tl.float8e4nv), mask=at < num_columns)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in fp8.

    Args:
        x: (N, K) floating point, rows contiguous in themselves.

    Returns:
        (N, K) e4m3, contiguous, and the factor of each row, (N, 1) fp32.
    """
    if runs_triton() and x.is_cuda and x.stride(1) == 1:
        out, scale = torch.empty(x.shape, dtype=FP8, device=x.device), x.new_empty(x.shape[0], 1, dtype=torch.float32)
        if x.shape[0]:
            with torch.cuda.device(x.device):
                _quantize_kernel[(x.shape[0],)](x, out, scale, x.shape[1], x.stride(0), BLOCK=2048, num_warps=4)
        return out, scale
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp_min(SMALLEST) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


def matmul_fp8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    fast_accumulation: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(x x_scale) (weight weight_scale)^T`.

    Args:
        x: (N, K) e4m3 or e5m2, row-major; x_scale: (N, 1) fp32, or () for both factors.
        weight: (M, K) e4m3, row-major; weight_scale: (1, M) fp32, or ().
        dtype: of the result.
        fast_accumulation: the matrix units add up with about 14 bits behind the point; else partial sums go to fp32.
        out: (N, M) in `dtype` to write to, rows contiguous in themselves, or None for a new one.

    Returns:
        (N, M). On CUDA the hardware must have fp8; on a CPU the values are the same, the speed is not.
    """
    if x.is_cuda:
        # With a scale per row, cuBLAS writes bf16 only.
        made = dtype if weight_scale.numel() == 1 else torch.bfloat16
        into = {"out": out} if out is not None and made == dtype else {}
        product = torch._scaled_mm(
            x,
            weight.t(),
            scale_a=x_scale,
            scale_b=weight_scale,
            out_dtype=made,
            use_fast_accum=fast_accumulation,
            **into,
        )
        if into:
            return product
    else:
        product = (x.float() @ weight.float().t()) * x_scale * weight_scale
    if out is not None:
        return out.copy_(product)
    # Not `to(dtype)` alone: where that does nothing and is what a traced `autograd.Function` returns, PyTorch 2.11 gives zero
    # gradients.
    return product if product.dtype == dtype else product.to(dtype)


def _quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    data, scale = quantize_rows(weight)
    return data, scale.t().contiguous()


class Fp8Linear(nn.Module):
    """A frozen linear layer in fp8, in place of an `nn.Linear` under an adapter.

    The fused LoRA operators read `weight` and its `fp8_state`; called by itself, the layer makes a dense weight and multiplies.
    """

    def __init__(self, weight: torch.Tensor, state: Fp8State, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight.fp8_state = state
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.data, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dense = self.weight.to(x.dtype) * self.weight.fp8_state.scale.t().to(x.dtype)
        return F.linear(x, dense, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, e4m3"


def to_fp8(linears: list[nn.Linear]) -> list[Fp8Linear]:
    """The same layers in fp8. Layers that are given together read one input and share the transposed weight."""
    sizes = [linear.out_features for linear in linears]
    both = torch.cat([linear.weight.data for linear in linears]) if len(linears) > 1 else linears[0].weight.data
    data, scale = _quantize_weight(both)
    transposed, scale_transposed = _quantize_weight(both.t().contiguous())
    del both
    made = []
    for linear, weight, own in zip(linears, data.split(sizes), scale.split(sizes, dim=1), strict=True):
        state = Fp8State(own.contiguous(), transposed, scale_transposed)
        made.append(Fp8Linear(weight, state, linear.bias))
        linear.weight.data = linear.weight.data.new_empty(0)  # whoever still holds the layer holds no memory
    return made
