"""Linear layers that train with all three of their matmuls in 8-bit floating point, scaled by the values of the moment.

    y = x W^T        dx = dy W        dW = dy^T x

Weights, activations and gradients keep their dtype; each matmul quantizes its two factors and multiplies them. All of it is
plain PyTorch but for the matmul itself, so that the compiler joins the search for the largest value and the cast with what
makes the factor (a norm, an activation) and makes one quantized tensor for all layers that read it. Without the compiler
every factor is passed over several times, which costs more than it saves.

The recipes are those of torchao, by name and arithmetic (`torchao.float8.config`), which would be an extra to install and brings
its own layers and tensor types. e5m2 has the range for gradients that share one scale, e4m3 the digits for those that do not
(https://arxiv.org/abs/2209.05433).

Shape legend: N tokens, H features in, O features out; M, P, K any.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from axolotl.kernels.fp8 import FP8, MULTIPLE, SMALLEST, matmul_fp8
from axolotl.kernels.utils import compute_dtype


class Recipe(NamedTuple):
    """How the factors of the three matmuls are quantized.

    Attributes:
        per_row: one scale per row along the axis that is summed, rounded up to a power of two, so that what is large has the
            same eight bits both ways round; else one scale per tensor.
        grad_dtype: of dy.
        dense_weight_gradient: dW is made of dense factors, and dx shares one scale for W.
        fast_gradients: the matrix units add up gradients with fewer bits too, as they do for y.
    """

    per_row: bool
    grad_dtype: torch.dtype
    dense_weight_gradient: bool
    fast_gradients: bool


RECIPES: dict[str, Recipe] = {
    "tensorwise": Recipe(False, torch.float8_e5m2, False, False),
    "rowwise": Recipe(True, FP8, False, True),
    "rowwise_with_gw_hp": Recipe(True, FP8, True, True),
}


def _scale(x: torch.Tensor, dtype: torch.dtype, recipe: Recipe, *, per_row: bool) -> torch.Tensor:
    """What x (M, K) is divided by to fit into `dtype`: (M, 1), or () for one scale. NaN where x has one."""
    # By rows first in any case: that is the shape of the reductions (norms) that it can be joined with.
    largest = x.abs().amax(-1, keepdim=True)
    if not per_row:
        largest = largest.amax()
    scale = largest.float().clamp_min(SMALLEST) / torch.finfo(dtype).max
    return torch.exp2(torch.ceil(torch.log2(scale))) if recipe.per_row else scale


def _cast(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x (M, K) over its scale in `dtype`, row-major."""
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype).contiguous()


def _multiply(
    a: torch.Tensor, a_scale: torch.Tensor, a_dtype: torch.dtype, b: torch.Tensor, b_scale: torch.Tensor,
    out_dtype: torch.dtype, *, fast: bool,
) -> torch.Tensor:  # fmt: skip
    """`a b^T` (M, P) of a (M, K) and b (P, K)."""
    if a_scale.dim() and not b_scale.dim():
        b_scale = b_scale.expand(b.shape[0], 1).contiguous()
    return matmul_fp8(
        _cast(a, a_scale, a_dtype), a_scale, _cast(b, b_scale, FP8), b_scale.t(), out_dtype, fast_accumulation=fast
    )


def _grad_input(grad: torch.Tensor, weight: torch.Tensor, recipe: Recipe, dtype: torch.dtype) -> torch.Tensor:
    """`dy W` (N, H)."""
    grad_scale = _scale(grad, recipe.grad_dtype, recipe, per_row=recipe.per_row)
    if recipe.per_row and not recipe.dense_weight_gradient:
        weight_scale = _scale(weight.t(), FP8, recipe, per_row=True)
    else:
        weight_scale = _scale(weight, FP8, recipe, per_row=False)
    return _multiply(grad, grad_scale, recipe.grad_dtype, weight.t(), weight_scale, dtype, fast=recipe.fast_gradients)


def _grad_weight(grad: torch.Tensor, x: torch.Tensor, recipe: Recipe, dtype: torch.dtype) -> torch.Tensor:
    """`dy^T x` (O, H)."""
    if recipe.dense_weight_gradient:
        return (grad.t() @ x).to(dtype)
    if not recipe.per_row:  # the same scales as in the other two matmuls
        grad_scale = _scale(grad, recipe.grad_dtype, recipe, per_row=False)
        x_scale = _scale(x, FP8, recipe, per_row=False)
    missing = -x.shape[0] % MULTIPLE
    if missing:
        grad, x = F.pad(grad, (0, 0, 0, missing)), F.pad(x, (0, 0, 0, missing))
    if recipe.per_row:
        grad_scale = _scale(grad.t(), recipe.grad_dtype, recipe, per_row=True)
        x_scale = _scale(x.t(), FP8, recipe, per_row=True)
    return _multiply(grad.t(), grad_scale, recipe.grad_dtype, x.t(), x_scale, dtype, fast=recipe.fast_gradients)


class _Fp8Product(torch.autograd.Function):
    """`x W^T` (N, O) of x (N, H) and W (O, H)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, recipe: str) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        own = RECIPES[recipe]
        x_scale = _scale(x, FP8, own, per_row=own.per_row)
        weight_scale = _scale(weight, FP8, own, per_row=own.per_row)
        return _multiply(x, x_scale, FP8, weight, weight_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        recipe = RECIPES[ctx.recipe]
        need_x, need_weight, _ = ctx.needs_input_grad
        return (
            _grad_input(grad, weight, recipe, x.dtype) if need_x else None,
            _grad_weight(grad, x, recipe, weight.dtype) if need_weight else None,
            None,
        )


def linear_fp8(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, recipe: str = "tensorwise"
) -> torch.Tensor:
    """`x W^T + bias`, with all matmuls in fp8.

    Args:
        x: (..., H) floating point; computed in the dtype of autocast where it is on.
        weight: (O, H) floating point; O and H are multiples of `MULTIPLE`. Its gradient has its dtype.
        bias: (O,) or None.
        recipe: a name of `RECIPES`.

    Returns:
        (..., O), in the dtype that is computed in.
    """
    rows = x.to(compute_dtype(x.device.type, x.dtype)).reshape(-1, x.shape[-1])
    y = _Fp8Product.apply(rows, weight, recipe).reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.to(y.dtype)


class Fp8TrainingLinear(nn.Linear):
    """An `nn.Linear` that multiplies in fp8 while it trains.

    It holds what `nn.Linear` holds, and in evaluation computes what `nn.Linear` computes, so that what is measured and generated
    is what the saved weights do.

    Attributes:
        recipe: a name of `RECIPES`.
    """

    recipe: str = "tensorwise"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or x.numel() == 0:
            return F.linear(x, self.weight, self.bias)
        return linear_fp8(x, self.weight, self.bias, self.recipe)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fp8 {self.recipe}"
