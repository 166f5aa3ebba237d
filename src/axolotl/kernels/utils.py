"""What the kernels share: Triton where it is installed, and when to use it.

A kernel has two bodies with the same algebra: Triton for CUDA tensors, plain PyTorch for the rest. Inside
`torch.compile` the plain body runs on every device, because the compiler then fuses it with its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # on machines without a GPU
    triton = tl = None

BLOCK = 1024
"""Elements per program of an elementwise kernel: 8 per thread, one 16-byte load of bf16."""


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` where Triton is installed; otherwise the function as it is, never to be called."""
    return function if triton is None else triton.jit(function)


@jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of fp32 values, to about 2 units in the last place: a square of a reciprocal root is one instruction where
    a division is ten."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


def runs_triton(*tensors: torch.Tensor) -> bool:
    """Whether elementwise Triton kernels can walk these tensors as flat memory."""
    return (
        triton is not None
        and not torch.compiler.is_compiling()
        and all(tensor.is_cuda and tensor.is_contiguous() for tensor in tensors)
    )


def num_programs(elements: int, block: int = BLOCK) -> tuple[int]:
    """Grid that covers `elements`."""
    return (-(-elements // block),)


def compute_dtype(device_type: str, otherwise: torch.dtype) -> torch.dtype:
    """The dtype that matmuls run in: that of autocast where it is on, else `otherwise`."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else otherwise
