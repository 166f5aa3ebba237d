"""GEGLU: `gelu(gate) * up`, exact or with the tanh approximation that Gemma is trained with.

See "GLU Variants Improve Transformer" (https://arxiv.org/abs/2002.05202).
"""

from __future__ import annotations

import torch

from axolotl.kernels.glu import gated_backward, gated_forward


def geglu_forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gelu(gate) * up` with the exact (erf) GELU, a new tensor. Both inputs have one shape and dtype."""
    return gated_forward(gate, up, "gelu")


def geglu_backward(
    grad_output: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of `geglu_forward`, in place.

    Returns:
        `(h, grad_gate, grad_up)`, in the memory of `grad_output`, `gate` and `up`: `h` is the output of forward.
    """
    return gated_backward(grad_output, gate, up, "gelu")


def geglu_tanh_forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`geglu_forward` with GELU's tanh approximation."""
    return gated_forward(gate, up, "gelu_tanh")


def geglu_tanh_backward(
    grad_output: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`geglu_backward` with GELU's tanh approximation, in place."""
    return gated_backward(grad_output, gate, up, "gelu_tanh")
