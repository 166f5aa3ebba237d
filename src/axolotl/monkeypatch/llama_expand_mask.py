"""Expand the attention mask of packed rows, as in section 3.2.2 of https://arxiv.org/abs/2107.02027."""

from __future__ import annotations

import torch

from axolotl._moved import old_name

__getattr__ = old_name(__name__)


def _expand_mask(mask: torch.Tensor, dtype: torch.dtype, tgt_len: int | None = None) -> torch.Tensor:
    """An additive mask that keeps documents apart, without causality.

    Args:
        mask: (B, S), 0 for padding and the number of its document for any other token; a mask of ones is one document.
        dtype: of the result.
        tgt_len: number of queries; S by default.

    Returns:
        (B, 1, tgt_len, S), 0 where a query may look and the least number of `dtype` elsewhere.
    """
    tgt_len = mask.shape[1] if tgt_len is None else tgt_len
    same = mask[:, None, :tgt_len, None] == mask[:, None, None, :]
    visible = same & (mask != 0)[:, None, None, :]
    return torch.zeros(visible.shape, dtype=dtype, device=mask.device).masked_fill(~visible, torch.finfo(dtype).min)


def hijack_expand_mask() -> None:
    """Nothing is left to replace: `axolotl.monkeypatch.attention.documents` tells documents to every backend."""
