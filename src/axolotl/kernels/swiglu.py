"""SwiGLU: `silu(gate) * up`. See "GLU Variants Improve Transformer" (https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import torch

from axolotl.kernels.glu import gated_backward, gated_forward


def swiglu_forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gate * sigmoid(gate) * up`, a new tensor. Both inputs have one shape and dtype."""
    return gated_forward(gate, up, "silu")


def swiglu_backward(
    grad_output: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of `swiglu_forward`, in place.

    Returns:
        `(h, grad_gate, grad_up)`, in the memory of `grad_output`, `gate` and `up`: `h` is the output of forward.
    """
    return gated_backward(grad_output, gate, up, "silu")
