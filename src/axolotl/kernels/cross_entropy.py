"""Linear + cross-entropy without the logits: the loss of an output head in bounded memory.

In: hidden states before the head, the head's weight, labels. Out: the sum of the token losses. Rows whose label is
`ignore_index` are dropped before the matmul; the rest go through the head a few rows at a time, and the gradient of a
chunk is taken while its logits are at hand, so that no more than `chunk_elements` logits ever exist. Follows the fused
linear cross-entropy of Liger-Kernel (https://arxiv.org/abs/2410.10989), in plain PyTorch: it runs on every device.

Shape legend: B batch, T time, N rows (B*T), S supervised rows, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**26
"""Logits alive at once: 2**26 fp32 values are 256 MiB, enough rows to keep a GPU's matmul busy."""


def linear_cross_entropy(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> torch.Tensor:
    """Sum over rows of `-log softmax(f(hidden @ weight.T + bias))[label]`.

    `f` multiplies by `logit_scale`, then applies `softcap * tanh(x / softcap)` when a softcap is given. Matmuls run in
    the dtype of the hidden states (or of autocast), the softmax in fp32.

    Args:
        hidden_NH: (..., H) floating point.
        weight_VH: (V, H) floating point.
        labels_N: (...) int64, the shape of `hidden_NH` without its last axis. Already shifted.
        bias_V: (V,) or None.
        ignore_index: label of rows that do not count.
        softcap: cap of the logits, or None.
        logit_scale: factor of the logits.
        chunk_elements: at most this many logits exist at once (always at least one row).

    Returns:
        Scalar fp32. Differentiable once with respect to hidden, weight and bias.
    """
    hidden_NH = hidden_NH.reshape(-1, hidden_NH.shape[-1])
    labels_N = labels_N.reshape(-1).to(hidden_NH.device)
    kept_S = (labels_N != ignore_index).nonzero().squeeze(1)
    device_type = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_NH.dtype
    # `index_select` is differentiable: its backward writes zeros to the rows that were dropped.
    hidden_SH = hidden_NH if kept_S.numel() == labels_N.numel() else hidden_NH.index_select(0, kept_S)
    labels_S = labels_N if kept_S.numel() == labels_N.numel() else labels_N.index_select(0, kept_S)
    rows = max(1, chunk_elements // weight_VH.shape[0])
    return _LinearCrossEntropy.apply(hidden_SH, weight_VH, bias_V, labels_S, softcap, logit_scale, rows, dtype)


def _chunk_logits(x_CH, weight_VH, bias_V, softcap, logit_scale):
    """fp32 logits of some rows, and `tanh(x / softcap)` where a softcap applies (its derivative needs it)."""
    z_CV = F.linear(x_CH, weight_VH, bias_V).float()
    if logit_scale != 1.0:
        z_CV.mul_(logit_scale)
    if softcap is None:
        return z_CV, None
    tanh_CV = torch.tanh_(z_CV.div_(softcap))
    return tanh_CV * softcap, tanh_CV


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward takes the gradients too: the upstream gradient is a scalar that backward multiplies in."""

    @staticmethod
    def forward(ctx, hidden_SH, weight_VH, bias_V, labels_S, softcap, logit_scale, rows, dtype):
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        need_bias = bias_V is not None and ctx.needs_input_grad[2]
        weight = weight_VH.detach().to(dtype)
        bias = None if bias_V is None else bias_V.detach().to(dtype)
        grad_hidden = torch.empty_like(hidden_SH) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_SH.device)

        with torch.no_grad(), torch.autocast(hidden_SH.device.type, enabled=False):
            for start in range(0, hidden_SH.shape[0], rows):
                part = slice(start, start + rows)
                x_CH = hidden_SH[part].detach().to(dtype)
                label_C1 = labels_S[part, None]
                logits_CV, tanh_CV = _chunk_logits(x_CH, weight, bias, softcap, logit_scale)
                lse_C1 = torch.logsumexp(logits_CV, dim=-1, keepdim=True)
                total += (lse_C1 - logits_CV.gather(1, label_C1)).sum()
                if not (need_hidden or need_weight or need_bias):
                    continue
                # d loss / d logits = softmax - onehot, written over the logits.
                grad_CV = logits_CV.sub_(lse_C1).exp_()
                grad_CV.scatter_add_(1, label_C1, torch.full_like(label_C1, -1.0, dtype=torch.float32))
                if tanh_CV is not None:
                    grad_CV.mul_(tanh_CV.square_().neg_().add_(1.0))
                if logit_scale != 1.0:
                    grad_CV.mul_(logit_scale)
                if grad_bias is not None:
                    grad_bias += grad_CV.sum(0)
                grad_CV = grad_CV.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = (grad_CV @ weight).to(grad_hidden.dtype)
                if grad_weight is not None:
                    grad_weight += (grad_CV.T @ x_CH).float()
        ctx.grads = (
            grad_hidden,
            grad_weight if grad_weight is None else grad_weight.to(weight_VH.dtype),
            grad_bias if grad_bias is None else grad_bias.to(bias_V.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        scaled = tuple(None if grad is None else grad.mul_(grad_total.to(grad.dtype)) for grad in ctx.grads)
        del ctx.grads
        return *scaled, None, None, None, None, None
