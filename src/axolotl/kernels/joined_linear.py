"""Linear layers of one input as one, inside `torch.compile`: one matmul each for outputs, gradient of the input and gradients of the weights.

    y = x [W_0; W_1; ...]^T        dx = dy [W_0; W_1; ...]        [dW_0; dW_1; ...] = dy^T x

The weights are trained, and stay separate. Where they lie one below the other in one memory (`lay_in_a_row`) they are multiplied
as they are; otherwise, such as after a move to another device, each by itself. Small matmuls, such as those of keys and values
that few heads share, leave most of a GPU idle, and of the gradients of the input no sum is formed.

The compiler fuses what is around the operators, biases and activations included. Where queries and keys are rotated (RoPE) right
after, the kernel that does it below adapters does it here, without one: backward writes the gradients of the three side by side
in one pass over them, of which the compiler makes three.

Shape legend: N tokens, H features in, O features out.
"""

from __future__ import annotations

import torch

from axolotl.kernels.frozen_weights import lie_in_a_row, stack
from axolotl.kernels.lora_ops import rotate_in_graph
from axolotl.kernels.utils import compute_dtype


@torch.library.custom_op("axolotl::joined_linear", mutates_args=(), schema="(Tensor x, Tensor[] weights) -> Tensor")
def _joined_linear(x, weights):
    """The outputs side by side (N, O_0 + O_1 + ...)."""
    if lie_in_a_row(weights):
        return x @ stack(weights).t()
    rows = [weight.shape[0] for weight in weights]
    y_NO = x.new_empty(x.shape[0], sum(rows))
    for part, weight in zip(y_NO.split(rows, dim=1), weights, strict=True):
        part.addmm_(x, weight.t(), beta=0)
    return y_NO


@_joined_linear.register_fake
def _(x, weights):
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


@torch.library.custom_op(
    "axolotl::joined_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor[] weights, bool need_x, bool need_weights) -> (Tensor, Tensor)",
)
def _joined_linear_backward(grad, x, weights, need_x, need_weights):
    """The gradients of x (N, H) and of the weights, one below the other (O_0 + O_1 + ..., H); empty unless asked for."""
    grad_w_OH = grad.t() @ x if need_weights else x.new_empty(0)
    if not need_x:
        return x.new_empty(0), grad_w_OH
    if lie_in_a_row(weights):
        return grad @ stack(weights), grad_w_OH
    first, *others = zip(grad.split([weight.shape[0] for weight in weights], dim=1), weights, strict=True)
    grad_x_NH = torch.mm(*first)
    for part, weight in others:
        grad_x_NH.addmm_(part, weight)
    return grad_x_NH, grad_w_OH


@_joined_linear_backward.register_fake
def _(grad, x, weights, need_x, need_weights):
    grad_w_OH = x.new_empty(grad.shape[1], x.shape[1]) if need_weights else x.new_empty(0)
    return x.new_empty(x.shape) if need_x else x.new_empty(0), grad_w_OH


def _keep(ctx, inputs, output):
    x, weights = inputs
    ctx.save_for_backward(x, *weights)


def _differentiate(ctx, grad):
    x, *weights = ctx.saved_tensors
    need_x, needed = ctx.needs_input_grad
    grad_x, grad_w = torch.ops.axolotl.joined_linear_backward(grad.contiguous(), x, weights, need_x, any(needed))
    # Whole rows: each gradient is contiguous, and nothing is copied.
    grads = grad_w.split([weight.shape[0] for weight in weights]) if any(needed) else [None] * len(weights)
    return grad_x if need_x else None, [part if need else None for part, need in zip(grads, needed, strict=True)]


_joined_linear.register_autograd(_differentiate, setup_context=_keep)


def _multiply(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """(..., O_0 + O_1 + ...), in the dtype of autocast where it is on, else that of x."""
    dtype = compute_dtype(x.device.type, x.dtype)
    x_NH = x.reshape(-1, x.shape[-1]).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        if any(weight.dtype != dtype for weight in weights):
            weights = [torch.cat([weight.to(dtype) for weight in weights])]  # the casts write to their places
        y_NO = torch.ops.axolotl.joined_linear(x_NH, weights)
    return y_NO.view(*x.shape[:-1], y_NO.shape[-1])


def joined_linear(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]
) -> list[torch.Tensor]:
    """Several linear layers of one input, for use under `torch.compile`.

    Args:
        x: (..., H).
        weights: per layer (O, H), of one dtype: that of x, or any under autocast. Their gradients have it too.
        biases: per layer (O,) or None.

    Returns:
        Per layer (..., O), in the dtype of autocast where it is on, else that of x. Without a bias they are parts of one
        memory: what keeps one of them keeps all.
    """
    outputs = _multiply(x, weights).split([weight.shape[0] for weight in weights], dim=-1)
    return [y if bias is None else y + bias.to(y.dtype) for y, bias in zip(outputs, biases, strict=True)]


def joined_linear_rotated(
    x: torch.Tensor, weights: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys with their positions, and values, for use under `torch.compile` where `rotates_in_graph`.

    Args:
        x: (B, T, H).
        weights: of query, key and value, as in `joined_linear`.
        cos: (B, T, D) or (1, T, D), where D are the features of a head.
        sin: as `cos`.

    Returns:
        Queries and keys (B, T, heads, D) and values (B, T, O), each a memory of its own.
    """
    rows = [weight.shape[0] for weight in weights]
    y = _multiply(x, weights)
    no_adapter = y.new_empty(sum(rows), 0)
    return rotate_in_graph(y, no_adapter, rows, [0, 0, 0], [None, None, None], cos, sin)
