"""Linear + cross-entropy without the logits: the loss of an output head in bounded memory.

In: hidden states before the head, the head's weight, labels. Out: the sum of the token losses. Rows whose label is
`ignore_index` are dropped before the matmul; the rest go through the head a few rows at a time, and the gradient of a
chunk is taken while its logits are at hand, so that no more than `chunk_elements` logits ever exist. Follows the fused
linear cross-entropy of Liger-Kernel (https://arxiv.org/abs/2410.10989). The matmuls are PyTorch's; on CUDA one Triton kernel
reads the logits of a row twice and writes their gradient over them, elsewhere PyTorch does it in fp32.

What a row's loss is, with logits z, their log-sum-exp and the label y (`TokenLoss` names the rest):
    w * p_y^[token_scaling] * (lse - (1 - label_smoothing) * z_y - label_smoothing * mean(z) + z_loss * lse^2)

Shape legend: B batch, T time, N rows (B*T), S supervised rows, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from axolotl.kernels.utils import jit, num_programs, runs_triton, sigmoid, tl

CHUNK_ELEMENTS = 2**26
"""Logits alive at once: 2**26 fp32 values are 256 MiB, enough rows to keep a GPU's matmul busy."""

_ROW_MULTIPLE = 128
"""A matmul works on blocks of so many rows; chunks of fewer leave part of a GPU idle."""
_ROWS_OF_TRAINED_HEAD = 4096
"""Of a chunk: with so many the passes over the head's gradient take less than a tenth of the time of its matmul."""
_BLOCK_V = 8192
_WARPS_OF_ROW = 32
_BLOCK_SCALED = 4096


@dataclass(frozen=True)
class TokenLoss:
    """How raw logits become the loss of a token.

    Attributes:
        softcap: `softcap * tanh(z / softcap)` bounds the logits, or None. After `logit_scale`.
        logit_scale: factor of the logits.
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        z_loss: weight of the squared log-sum-exp (PaLM, https://arxiv.org/abs/2204.02311, section 5).
        token_scaling: weigh each token by the probability that the model gives it, taken as a constant (dynamic fine-tuning,
            https://arxiv.org/abs/2508.05629).
        entropy_top_k: weigh each token by `entropy_weights` over so many tokens, taken as a constant; 0 for w = 1.
        entropy_alpha: exponent of that weight.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    token_scaling: bool = False
    entropy_top_k: int = 0
    entropy_alpha: float = 1.0


def entropy_weights(logits_CV: torch.Tensor, kind: TokenLoss) -> torch.Tensor:
    """How undecided the model is at each token: the entropy of its `entropy_top_k` most probable tokens over its maximum.

    Entropy-adaptive fine-tuning (https://arxiv.org/abs/2601.02151): tokens of which the model is sure, right or wrong, weigh
    little, so that what it knows is not overwritten.

    Args:
        logits_CV: raw logits; scale and softcap keep their order.
        kind: `entropy_top_k`, `entropy_alpha`, and what the model does to its logits.

    Returns:
        (C, 1) fp32 between 0 and 1, to the power `entropy_alpha`. Without a gradient.
    """
    number = min(kind.entropy_top_k, logits_CV.shape[1])
    top_CK = logits_CV.detach().topk(number, dim=-1).values.float() * kind.logit_scale
    if kind.softcap is not None:
        top_CK = torch.tanh(top_CK / kind.softcap) * kind.softcap
    log_p_CK = top_CK.log_softmax(dim=-1)
    entropy_C1 = -(log_p_CK.exp() * log_p_CK).sum(dim=-1, keepdim=True)
    return (entropy_C1 / math.log(number)).clamp(0.0, 1.0).pow(kind.entropy_alpha)


@jit
def _capped(z, scale, softcap, CAPPED: tl.constexpr):
    """fp32 logits after scale and softcap, and their derivative by z."""
    z = z.to(tl.float32) * scale
    slope = scale
    if CAPPED:
        # tanh(y) = 2 sigmoid(2 y) - 1
        tanh = 2.0 * sigmoid(2.0 * z / softcap) - 1.0
        slope = scale * (1.0 - tanh * tanh)
        z = tanh * softcap
    return z, slope


@jit
def _cross_entropy_kernel(
    logits_ptr, label_ptr, loss_ptr, num_columns, scale, softcap, smoothing, z_loss,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, SCALED: tl.constexpr, WRITE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program: its loss, then the gradient of its logits over them.

    Each lane has a highest logit and a sum of its own, so that no lane waits for another before the end of the row.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * num_columns
    columns = tl.arange(0, BLOCK)
    log2_e = 1.4426950408889634
    top = tl.full((BLOCK,), -1e30, tl.float32)  # in units of log 2, as exponents are
    total = tl.zeros((BLOCK,), tl.float32)  # of 2^(z - top)
    plain_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_columns, BLOCK):
        at = start + columns
        inside = at < num_columns
        z, _ = _capped(tl.load(row_ptr + at, mask=inside, other=-float("inf")), scale, softcap, CAPPED)
        if CAPPED:
            z = tl.where(inside, z, -float("inf"))
        if SMOOTHED:
            plain_sum += tl.where(inside, z, 0.0)
        # Of 2^(z - higher) and 2^(top - higher) one is 1.
        z = z * log2_e
        above = z - top
        power = tl.exp2(-tl.abs(above))
        total = tl.where(above > 0.0, total * power + 1.0, total + power)
        top = tl.maximum(top, z)
    highest = tl.max(top, axis=0)
    lse_2 = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), axis=0))
    lse = lse_2 * 0.6931471805599453
    label = tl.load(label_ptr + row)
    target, target_slope = _capped(tl.load(row_ptr + label), scale, softcap, CAPPED)
    loss = lse - target + z_loss * lse * lse
    if SMOOTHED:
        loss += smoothing * (target - tl.sum(plain_sum, axis=0) / num_columns)
    weight = 1.0
    if SCALED:
        weight = tl.exp(target - lse)
    tl.store(loss_ptr + row, loss * weight)
    if WRITE_GRADIENT:
        share = weight * (1.0 + 2.0 * z_loss * lse)  # of a probability
        everywhere = weight * smoothing / num_columns
        # The label's logit is read above by every lane before any lane writes below.
        tl.debug_barrier()
        for start in range(0, num_columns, BLOCK):
            at = start + columns
            inside = at < num_columns
            z, slope = _capped(tl.load(row_ptr + at, mask=inside, other=0.0), scale, softcap, CAPPED)
            grad = tl.exp2(z * log2_e - lse_2) * share
            if SMOOTHED:
                grad -= everywhere
            tl.store(row_ptr + at, (grad * slope).to(logits_ptr.dtype.element_ty), mask=inside)
        # The label's own, after what the loop wrote there.
        tl.debug_barrier()
        grad = tl.exp2(target * log2_e - lse_2) * share - weight
        if SMOOTHED:
            grad += weight * smoothing - everywhere
        tl.store(row_ptr + label, (grad * target_slope).to(logits_ptr.dtype.element_ty))


def _loss_and_gradient(
    logits_CV: torch.Tensor, label_C: torch.Tensor, kind: TokenLoss, need_gradient: bool
) -> torch.Tensor:
    """The sum of the losses of some rows of raw logits, fp32. The gradient of the logits is written over them."""
    entropy_C1 = entropy_weights(logits_CV, kind) if kind.entropy_top_k else None
    if runs_triton(logits_CV) and logits_CV.dtype != torch.float64:
        return _loss_and_gradient_triton(logits_CV, label_C, kind, entropy_C1, need_gradient)
    return _loss_and_gradient_torch(logits_CV, label_C, kind, entropy_C1, need_gradient)


def _loss_and_gradient_triton(
    logits_CV: torch.Tensor,
    label_C: torch.Tensor,
    kind: TokenLoss,
    entropy_C1: torch.Tensor | None,
    need_gradient: bool,
) -> torch.Tensor:
    softcap, smoothing, num_columns = kind.softcap, kind.label_smoothing, logits_CV.shape[1]
    loss_C = torch.empty(logits_CV.shape[0], dtype=torch.float32, device=logits_CV.device)
    with torch.cuda.device(logits_CV.device):
        _cross_entropy_kernel[(logits_CV.shape[0],)](
            logits_CV, label_C, loss_C, num_columns, kind.logit_scale, 1.0 if softcap is None else softcap,
            smoothing, kind.z_loss, CAPPED=softcap is not None, SMOOTHED=smoothing > 0.0,
            SCALED=kind.token_scaling, WRITE_GRADIENT=need_gradient, BLOCK=_BLOCK_V, num_warps=_WARPS_OF_ROW,
        )  # fmt: skip
    if entropy_C1 is None:
        return loss_C.sum()
    if need_gradient:
        logits_CV.mul_(entropy_C1)
    return (loss_C * entropy_C1[:, 0]).sum()


def _loss_and_gradient_torch(
    logits_CV: torch.Tensor,
    label_C: torch.Tensor,
    kind: TokenLoss,
    entropy_C1: torch.Tensor | None,
    need_gradient: bool,
) -> torch.Tensor:
    """What the kernel computes, in PyTorch."""
    softcap, smoothing, num_columns = kind.softcap, kind.label_smoothing, logits_CV.shape[1]
    z_CV = logits_CV.float()
    if kind.logit_scale != 1.0:
        z_CV = z_CV * kind.logit_scale
    tanh_CV = None
    if softcap is not None:
        tanh_CV = torch.tanh(z_CV / softcap)
        z_CV = tanh_CV * softcap
    lse_C1 = torch.logsumexp(z_CV, dim=-1, keepdim=True)
    label_C1 = label_C[:, None]
    target_C1 = z_CV.gather(1, label_C1)
    loss_C1 = lse_C1 - target_C1
    if smoothing:
        loss_C1 = loss_C1 + smoothing * (target_C1 - z_CV.mean(-1, keepdim=True))
    if kind.z_loss:
        loss_C1 = loss_C1 + kind.z_loss * lse_C1.square()
    weight_C1 = (target_C1 - lse_C1).exp() if kind.token_scaling else None
    if entropy_C1 is not None:
        weight_C1 = entropy_C1 if weight_C1 is None else weight_C1 * entropy_C1
    if weight_C1 is not None:
        loss_C1 = loss_C1 * weight_C1
    if need_gradient:
        # d loss / d logits = softmax - onehot, and what smoothing, the z-loss and the weight make of it.
        grad_CV = (z_CV - lse_C1).exp_()
        if kind.z_loss:
            grad_CV.mul_(1 + 2 * kind.z_loss * lse_C1)
        if smoothing:
            grad_CV.sub_(smoothing / num_columns)
        grad_CV.scatter_add_(1, label_C1, torch.full_like(label_C1, smoothing - 1.0, dtype=torch.float32))
        if tanh_CV is not None:
            grad_CV.mul_(tanh_CV.square_().neg_().add_(1.0))
        if weight_C1 is not None:
            grad_CV.mul_(weight_C1)
        logits_CV.copy_(grad_CV.mul_(kind.logit_scale) if kind.logit_scale != 1.0 else grad_CV)
    return loss_C1.sum()


def rows_at_once(
    num_columns: int,
    logit_bytes: int,
    chunk_elements: int | None = None,
    *,
    on_gpu: bool,
    trained_width: int | None = None,
) -> int:
    """Rows of a chunk, at least one.

    Args:
        num_columns: size of the vocabulary.
        logit_bytes: bytes of a logit.
        chunk_elements: at most this many fp32 logits, or twice as many of half precision; None for `CHUNK_ELEMENTS`, or more
            where `trained_width` says so.
        on_gpu: use blocks of rows that fill a GPU.
        trained_width: hidden size of a head that is trained. Each chunk reads and writes the fp32 gradient of the head, so that
            on a GPU fewer and larger ones pay until the logits are as large.
    """
    rows = max(1, (chunk_elements or CHUNK_ELEMENTS) // num_columns)
    if not on_gpu:
        return rows
    # Logits of half precision, with no fp32 copy, leave room for twice as many.
    rows = rows * 2 if logit_bytes == 2 else rows
    if trained_width is not None and chunk_elements is None:
        rows = max(rows, min(_ROWS_OF_TRAINED_HEAD, trained_width * 4 // logit_bytes))
    return max(_ROW_MULTIPLE, rows // _ROW_MULTIPLE * _ROW_MULTIPLE)


def find_kept_rows(labels_N: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """The rows that count, (S,) int64, of labels of any shape laid in a row."""
    return (labels_N.reshape(-1) != ignore_index).nonzero().squeeze(1)


def linear_cross_entropy(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_scaling: bool = False,
    entropy_top_k: int = 0,
    entropy_alpha: float = 1.0,
    chunk_elements: int | None = None,
    kept_S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over rows of `-log softmax(f(hidden @ weight.T + bias))[label]`, or of what else `TokenLoss` says.

    `f` multiplies by `logit_scale`, then applies `softcap * tanh(x / softcap)` when a softcap is given. Matmuls run in
    the dtype of the hidden states (or of autocast), the softmax in fp32.

    Args:
        hidden_NH: (..., H) floating point.
        weight_VH: (V, H) floating point.
        labels_N: (...) int64, the shape of `hidden_NH` without its last axis. Already shifted.
        bias_V: (V,) or None.
        ignore_index: label of rows that do not count.
        softcap: see `TokenLoss`, as the next six.
        logit_scale: factor of the logits.
        label_smoothing: share of the target that is spread over the vocabulary.
        z_loss: weight of the squared log-sum-exp.
        token_scaling: weigh each token by its probability.
        entropy_top_k: weigh each token by the entropy of so many tokens.
        entropy_alpha: exponent of that weight.
        chunk_elements: at most this many logits exist at once (always at least one row), as for `rows_at_once`.
        kept_S: `find_kept_rows` of the labels, for a caller that has it: finding them waits for a GPU.

    Returns:
        Scalar fp32. Differentiable once with respect to hidden, weight and bias.
    """
    hidden_NH = hidden_NH.reshape(-1, hidden_NH.shape[-1])
    labels_N = labels_N.reshape(-1).to(hidden_NH.device)
    kept_S = find_kept_rows(labels_N, ignore_index) if kept_S is None else kept_S.to(hidden_NH.device)
    device_type = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_NH.dtype
    hidden_SH = hidden_NH if kept_S.numel() == labels_N.numel() else _SelectRows.apply(hidden_NH, kept_S)
    labels_S = labels_N if kept_S.numel() == labels_N.numel() else labels_N.index_select(0, kept_S)
    rows = rows_at_once(
        weight_VH.shape[0],
        dtype.itemsize,
        chunk_elements,
        on_gpu=hidden_NH.is_cuda,
        trained_width=weight_VH.shape[1] if weight_VH.requires_grad and torch.is_grad_enabled() else None,
    )
    kind = TokenLoss(softcap, logit_scale, label_smoothing, z_loss, token_scaling, entropy_top_k, entropy_alpha)
    return _LinearCrossEntropy.apply(hidden_SH, weight_VH, bias_V, labels_S, kind, rows, dtype)


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`total + a b` in the memory of `total`, fp32, or `a b`; on CUDA without a pass over a product in half precision."""
    fused = a.is_cuda and a.dtype in (torch.float16, torch.bfloat16)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32) if fused else (a @ b).float()
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total) if fused else total.add_((a @ b).float())


@jit
def _scale_kernel(ptr, scale_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(ptr + at, mask=inside).to(tl.float32) * tl.load(scale_ptr).to(tl.float32)
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=inside)


def _scale_(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`values *= scale` with a scalar tensor that is not rounded to the dtype of `values` first, as PyTorch does."""
    if runs_triton(values) and values.dtype != torch.float64 and values.is_contiguous():
        with torch.cuda.device(values.device):
            _scale_kernel[num_programs(values.numel(), _BLOCK_SCALED)](
                values, scale, values.numel(), BLOCK=_BLOCK_SCALED
            )
        return values
    if values.dtype in (torch.float16, torch.bfloat16):
        return values.copy_(values.float() * scale)
    return values.mul_(scale.to(values.dtype))


class _SelectRows(torch.autograd.Function):
    """`index_select` of rows of which none is asked for twice: backward copies gradients, where that of PyTorch adds them up."""

    @staticmethod
    def forward(ctx, x_NH, rows_S):
        ctx.save_for_backward(rows_S)
        ctx.num_rows = x_NH.shape[0]
        return x_NH.index_select(0, rows_S)

    @staticmethod
    def backward(ctx, grad_SH):
        (rows_S,) = ctx.saved_tensors
        return grad_SH.new_zeros(ctx.num_rows, grad_SH.shape[1]).index_copy_(0, rows_S, grad_SH), None


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward takes the gradients too: the upstream gradient is a scalar that backward multiplies in."""

    @staticmethod
    def forward(ctx, hidden_SH, weight_VH, bias_V, labels_S, kind, rows, dtype):
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        need_bias = bias_V is not None and ctx.needs_input_grad[2]
        weight = weight_VH.detach().to(dtype)
        bias = None if bias_V is None else bias_V.detach().to(dtype)
        grad_hidden = torch.empty_like(hidden_SH) if need_hidden else None
        grad_weight: torch.Tensor | None = None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_SH.device)

        with torch.no_grad(), torch.autocast(hidden_SH.device.type, enabled=False):
            for start in range(0, hidden_SH.shape[0], rows):
                part = slice(start, start + rows)
                x_CH = hidden_SH[part].detach().to(dtype)
                logits_CV = F.linear(x_CH, weight, bias)
                needed = need_hidden or need_weight or need_bias
                total += _loss_and_gradient(logits_CV, labels_S[part], kind, needed)
                if not needed:
                    continue
                grad_CV = logits_CV  # written over
                if grad_bias is not None:
                    grad_bias += grad_CV.sum(0, dtype=torch.float32)
                if grad_hidden is not None:
                    grad_hidden[part] = (grad_CV @ weight).to(grad_hidden.dtype)
                if need_weight:
                    grad_weight = _add_product(grad_weight, grad_CV.T, x_CH)
                del logits_CV, grad_CV  # before the next ones are made
        if need_weight and grad_weight is None:  # no row has a label
            grad_weight = torch.zeros_like(weight_VH)
        ctx.grads = (
            grad_hidden,
            grad_weight if grad_weight is None else grad_weight.to(weight_VH.dtype),
            grad_bias if grad_bias is None else grad_bias.to(bias_V.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        scaled = tuple(None if grad is None else _scale_(grad, grad_total) for grad in ctx.grads)
        del ctx.grads
        return *scaled, None, None, None, None
