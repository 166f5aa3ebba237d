"""FlashAttention-4 as operators that `torch.compile` sees through.

The package (`pip install flash-attn-4`, import name `flash_attn.cute`) holds no compiled code: its kernels are made when they
are first needed. It registers no operators with PyTorch, so that a compiled layer would break at every call. These do, forward
and backward, dense and with borders of documents. https://github.com/Dao-AILab/flash-attention, `flash_attn/cute`; the
algorithm on Hopper is that of FlashAttention-3, https://arxiv.org/abs/2407.08608.

Shapes: B rows, T tokens per row, N = B * T, H query heads, K key heads, D head size. With borders (N, H, D), else (B, T, H, D).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Any

import torch

from axolotl.exceptions import first_line
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

PACKAGE = "flash_attn.cute"
GENERATIONS = (9, 10)
"""Major compute capabilities: Hopper, and Blackwell, where this has not run. Others are left to PyTorch's kernel."""
HEAD_SIZES = (64, 128)


@functools.cache
def is_installed() -> bool:
    """Whether the package can be imported, without importing it."""
    return importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec(PACKAGE) is not None


@functools.cache
def _kernels() -> Any:
    """The module of the kernels, or None where it is not there or cannot be loaded, with a warning.

    Its two functions are those that PyTorch's own registration of the package calls as well.
    """
    if not is_installed():
        return None
    # Of an argument that the kernels do not use, each time one is made.
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted to a JitArgument")
    try:
        module = importlib.import_module(f"{PACKAGE}.interface")
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError) as error:
        LOG.warning(f"flash-attn-4 is installed and not used, as it cannot be loaded: {first_line(error)}")
        return None
    if not (hasattr(module, "_flash_attn_fwd") and hasattr(module, "_flash_attn_bwd")):
        LOG.warning("flash-attn-4 is installed and not used, as this version of it has other functions.")
        return None
    return module


@torch.compiler.assume_constant_result
def is_usable(device: torch.device) -> bool:
    """Whether the kernels are there and made for the GPU `device`."""
    return (
        device.type == "cuda"
        and is_installed()
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device)[0] in GENERATIONS
        and _kernels() is not None
    )


def serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernels compute attention of these tensors, (..., D)."""
    sizes = {query.shape[-1], key.shape[-1], value.shape[-1]}
    return len(sizes) == 1 and query.shape[-1] in HEAD_SIZES and is_usable(query.device)


def _window(window: int, causal: bool) -> dict[str, Any]:
    """The package's words for the tokens that a query sees: itself and `window - 1` others before it, or all for 0."""
    left = window - 1 if window else None
    return {"causal": causal, "window_size_left": left, "window_size_right": 0 if causal else left}


@torch.library.custom_op(
    "axolotl::flash4",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? borders, SymInt longest, float scale, bool causal, int window) "
    "-> (Tensor, Tensor)",
)
def _flash4(q, k, v, borders, longest, scale, causal, window):
    """The output, shaped as q, and the fp32 log-sum-exp of the scores: (H, N) with borders, else (B, H, T)."""
    packed = {} if borders is None else _borders(borders, longest)
    out, lse = _kernels()._flash_attn_fwd(
        q, k, v, softmax_scale=scale, return_lse=True, **_window(window, causal), **packed
    )[:2]
    return out, lse


def _borders(borders: torch.Tensor, longest: int) -> dict[str, Any]:
    return {
        "cu_seqlens_q": borders,
        "cu_seqlens_k": borders,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


@_flash4.register_fake
def _(q, k, v, borders, longest, scale, causal, window):
    *rows, heads, _ = q.shape
    shape = (heads, *rows) if borders is not None else (rows[0], heads, rows[1])
    return torch.empty_like(q), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(
    "axolotl::flash4_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? borders, SymInt longest, float scale, "
    "bool causal, int window) -> (Tensor, Tensor, Tensor)",
)
def _flash4_backward(grad, q, k, v, out, lse, borders, longest, scale, causal, window):
    """The gradients of q, k and v."""
    packed = {} if borders is None else _borders(borders, longest)
    grad_q, grad_k, grad_v = _kernels()._flash_attn_bwd(
        q, k, v, out, grad, lse, softmax_scale=scale, **_window(window, causal), **packed,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )[:3]  # fmt: skip
    return grad_q, grad_k, grad_v


@_flash4_backward.register_fake
def _(grad, q, k, v, out, lse, borders, longest, scale, causal, window):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx, inputs, output):
    q, k, v, borders, longest, scale, causal, window = inputs
    ctx.save_for_backward(q, k, v, *output, borders)
    ctx.numbers = (longest, scale, causal, window)


def _differentiate(ctx, grad, _):
    q, k, v, out, lse, borders = ctx.saved_tensors
    grads = torch.ops.axolotl.flash4_backward(grad.contiguous(), q, k, v, out, lse, borders, *ctx.numbers)
    return *grads, None, None, None, None, None


_flash4.register_autograd(_differentiate, setup_context=_keep)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    causal: bool,
    window: int | None,
    borders: torch.Tensor | None = None,
    longest: int = 0,
) -> torch.Tensor:
    """Attention of whole rows, or of the documents between `borders`.

    Args:
        query: (B, T, H, D) or, with borders, (N, H, D), fp16 or bf16; `key` and `value` with K heads.
        scaling: factor of the scores.
        causal: whether a query sees only what is before it.
        window: tokens that a query sees, itself included, or None for all.
        borders: int32 (number of documents + 1,), or None.
        longest: tokens of the longest document.

    Returns:
        As `query`.
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    return torch.ops.axolotl.flash4(query, key, value, borders, longest, scaling, causal, window or 0)[0]
