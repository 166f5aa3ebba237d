"""`axolotl_varlen`: attention over documents of different lengths, with nothing beyond PyTorch.

On CUDA it runs `torch.nn.attention.varlen.varlen_attn` (flash attention that ships with PyTorch), or the kernels of
FlashAttention-4 where their package is installed; where neither can be used (CPU, fp32, soft caps, sinks, head sizes above 256,
dropout) each document goes through `scaled_dot_product_attention` or plain matrix products, with the same result. Registered
with transformers through its documented interfaces.

Shapes: B rows, T tokens per row, N = B * T, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import importlib.util
import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from axolotl.monkeypatch.attention import flash4
from axolotl.monkeypatch.attention.documents import mark_used
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

NAME = "axolotl_varlen"
MAX_KERNEL_HEAD_DIM = 256

if importlib.util.find_spec("torch.nn.attention.varlen"):
    from torch.nn.attention.varlen import varlen_attn

    # The kernel's keywords grew over releases: `is_causal` became `window_size=(-1, 0)`, `enable_gqa` came later.
    _KERNEL_KEYWORDS = frozenset(inspect.signature(varlen_attn).parameters)
else:
    varlen_attn = None
    _KERNEL_KEYWORDS = frozenset()


def register() -> None:
    """Make `attn_implementation="axolotl_varlen"` known to transformers. Safe to call again."""
    AttentionInterface.register(NAME, varlen_attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


def _compute_dtype(query: torch.Tensor, module: nn.Module) -> torch.dtype:
    """The dtype to attend in. Rotary embeddings and fp32 norms lift queries to fp32 although the run computes in half."""
    if query.dtype != torch.float32:
        return query.dtype
    device = query.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    # The weight of a 4-bit layer has the dtype that it is stored in, which says nothing of how the layer computes.
    dtypes = (vars(layer).get("compute_dtype") or layer.weight.dtype for layer in layers)
    return next((dtype for dtype in dtypes if dtype in (torch.float16, torch.bfloat16)), query.dtype)


def _document_mask(q_len: int, kv_len: int, window: int | None, causal: bool, device: torch.device) -> torch.Tensor:
    """(q_len, kv_len) bool: what each query may see. The last query stands beside the last key."""
    q = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    k = torch.arange(kv_len, device=device)[None, :]
    mask = k <= q if causal else torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    return mask & ((k - q).abs() < window) if window is not None else mask


def _attend(
    q_BHTD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    *,
    scaling: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    dropout: float,
    padding_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of whole rows. Returns (B, H, T, D)."""
    q_len, kv_len = q_BHTD.shape[2], k_BKSD.shape[2]
    gqa = q_BHTD.shape[1] != k_BKSD.shape[1]
    window = window if window is not None and window < kv_len else None
    needs_mask = window is not None or padding_BS is not None or (causal and q_len not in (1, kv_len))
    mask = None
    if needs_mask or softcap is not None or sinks is not None:
        mask = _document_mask(q_len, kv_len, window, causal, q_BHTD.device)
        if padding_BS is not None:
            # A padded query sees itself, as a row of nothing would be NaN.
            own = torch.eye(q_len, kv_len, dtype=torch.bool, device=mask.device).roll(kv_len - q_len, dims=1)
            mask = (mask & padding_BS[:, None, None, :].bool()) | own
    if softcap is None and sinks is None:
        is_causal = causal and mask is None and q_len > 1
        return F.scaled_dot_product_attention(
            q_BHTD,
            k_BKSD,
            v_BKSD,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=is_causal,
            scale=scaling,
            enable_gqa=gqa,
        )
    if gqa:
        groups = q_BHTD.shape[1] // k_BKSD.shape[1]
        k_BKSD, v_BKSD = k_BKSD.repeat_interleave(groups, dim=1), v_BKSD.repeat_interleave(groups, dim=1)
    scores = (q_BHTD @ k_BKSD.transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float() if mask is None else scores.float().masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, q_len, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = F.dropout(weights.to(v_BKSD.dtype), p=dropout)
    return weights @ v_BKSD


def kernel_refusal(
    query: torch.Tensor, value: torch.Tensor, softcap: float | None, sinks: torch.Tensor | None, dropout: float
) -> str | None:
    """Why PyTorch's varlen kernel cannot compute this attention, or None when it can."""
    head_dim = query.shape[-1]
    rules = (
        (varlen_attn is None, "this PyTorch has no torch.nn.attention.varlen"),
        (not query.is_cuda, "the tensors are not on a CUDA device"),
        (query.dtype not in (torch.float16, torch.bfloat16), f"it computes in half precision, not {query.dtype}"),
        (
            head_dim > MAX_KERNEL_HEAD_DIM or head_dim % 8 != 0,
            f"head size {head_dim} is above 256 or not a multiple of 8",
        ),
        (value.shape[-1] > head_dim, "values are wider than keys"),
        (softcap is not None, "it has no soft cap"),
        (sinks is not None, "it has no attention sinks"),
        (dropout > 0, "it has no dropout"),
    )
    return next((reason for broken, reason in rules if broken), None)


def _run_kernel(
    q_NHD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scaling: float,
    window: int | None,
    causal: bool,
) -> torch.Tensor:
    """FlashAttention-4, or `varlen_attn` in the words of the installed PyTorch. Returns (N, H, D)."""
    if flash4.serves(q_NHD, k_NKD, v_NKD):
        window = window if window is not None and window < longest else None
        return flash4.attend(
            q_NHD, k_NKD, v_NKD, scaling=scaling, causal=causal, window=window, borders=borders, longest=longest
        )
    assert varlen_attn is not None, "kernel_refusal has been asked"
    value_dim = v_NKD.shape[-1]
    if value_dim < q_NHD.shape[-1]:
        # Latent attention has narrower values than keys; the kernel wants one head size.
        v_NKD = F.pad(v_NKD, (0, q_NHD.shape[-1] - value_dim))
    keywords: dict[str, object] = {"scale": scaling} if "scale" in _KERNEL_KEYWORDS else {}
    if "scale" not in _KERNEL_KEYWORDS and not math.isclose(scaling, q_NHD.shape[-1] ** -0.5):
        q_NHD = q_NHD * (scaling * q_NHD.shape[-1] ** 0.5)
    if "window_size" in _KERNEL_KEYWORDS:
        left = window - 1 if window is not None and window < longest else -1
        keywords["window_size"] = (left, 0 if causal else left)
    else:
        keywords["is_causal"] = causal
    # Before the keyword existed the kernel took fewer key heads as they were (checked on torch 2.11).
    if q_NHD.shape[1] != k_NKD.shape[1] and "enable_gqa" in _KERNEL_KEYWORDS:
        keywords["enable_gqa"] = True
    return varlen_attn(q_NHD, k_NKD, v_NKD, borders, borders, longest, longest, **keywords)[..., :value_dim]


def varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' `AttentionInterface`.

    Args:
        module: the attention layer; `is_causal` is read from it when not given.
        query: (B, H, T, D); `key`, `value`: (B, K, S, D). S differs from T only with a cache.
        attention_mask: (B, S), 0 for padding, or None. Read only when the documents are not told by `cu_seq_lens_q`.
        dropout: applied to the weights; transformers gives 0 in evaluation.
        scaling: factor of the scores, 1 / sqrt(D) by default.
        sliding_window: number of tokens that a query sees, itself included.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        s_aux: (H,) logits of attention sinks.
        cu_seq_lens_q: int32 borders of the documents in the rows laid end to end.
        max_length_q: length of the longest document in tokens.

    Returns:
        (B, T, H, D) and None, as no weights are kept.
    """
    if cu_seq_lens_q is not None and not torch.compiler.is_compiling():
        mark_used()
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    dtype = _compute_dtype(query, module)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows, num_heads, q_len, _ = query.shape
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"{NAME} takes a (rows, tokens) attention mask, not one of shape {tuple(attention_mask.shape)}"
        )

    refusal = kernel_refusal(query, value, softcap, s_aux, dropout)
    windowed = sliding_window is not None and sliding_window < key.shape[2]
    window = sliding_window if windowed else None
    if cu_seq_lens_q is None or q_len != key.shape[2]:
        dense_is_fine = attention_mask is not None or q_len != key.shape[2] or refusal or window is None
        if attention_mask is None and q_len == key.shape[2] and not refusal and flash4.serves(query, key, value):
            rows_first = (x.transpose(1, 2) for x in (query, key, value))
            return flash4.attend(*rows_first, scaling=scale, causal=causal, window=window), None
        if dense_is_fine:
            out = _attend(
                query, key, value, scaling=scale, causal=causal, window=window, softcap=softcap, sinks=s_aux,
                dropout=dropout, padding_BS=attention_mask,
            )  # fmt: skip
            return out.transpose(1, 2).contiguous(), None
        cu_seq_lens_q = torch.arange(0, rows * q_len + 1, q_len, dtype=torch.int32, device=query.device)
        max_length_q = q_len

    flat = [x.transpose(1, 2).reshape(rows * q_len, x.shape[1], x.shape[-1]) for x in (query, key, value)]
    if refusal is None and (window is None or "window_size" in _KERNEL_KEYWORDS):
        longest = int(max_length_q) if max_length_q is not None else int(cu_seq_lens_q.diff().max())
        out_NHD = _run_kernel(*flat, cu_seq_lens_q.to(query.device), longest, scale, window, causal)
    else:
        if query.is_cuda:
            LOG.warning_once(
                f"Attention goes through one scaled_dot_product_attention per document, which is slow: {refusal}."
            )
        sizes = cu_seq_lens_q.diff().tolist()
        documents = zip(*(x.transpose(0, 1).unsqueeze(0).split(sizes, dim=2) for x in flat), strict=True)
        attended = [
            _attend(q, k, v, scaling=scale, causal=causal, window=window, softcap=softcap, sinks=s_aux, dropout=dropout)
            for q, k, v in documents
            if q.shape[2]
        ]
        out_NHD = torch.cat(attended, dim=2).squeeze(0).transpose(0, 1)
    return out_NHD.reshape(rows, q_len, num_heads, value.shape[-1]).contiguous(), None
