"""Shifted sparse attention (S2-Attn): training attends within groups, shifted by half a group for half of the heads.

Each document is cut into four groups; in the second half of the heads the cuts lie half a group earlier, so that knowledge
crosses them from layer to layer. Cost and memory of long documents fall to a quarter; evaluation and generation attend in full.
From LongLoRA (https://arxiv.org/abs/2309.12307, section 3.2). There the shift wraps around, and the first tokens of a row would
see its last ones; here the first half group stands alone instead. The groups are documents to the varlen kernel, so that it
works with packing, and at any length.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from axolotl.monkeypatch.attention.varlen import varlen_attention_forward

NAME = "axolotl_shifted"
NUM_GROUPS = 4


def register() -> None:
    """Make `attn_implementation="axolotl_shifted"` known to transformers. Safe to call again."""
    AttentionInterface.register(NAME, shifted_attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


def group_borders(borders: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Borders of the groups of every document.

    Args:
        borders: int32 (number of documents + 1,), borders of the documents.

    Returns:
        int32 borders of the plain and of the shifted groups. No group is empty, none reaches over a document.
    """
    starts, ends = borders[:-1, None].long(), borders[1:, None].long()
    size = -(-(ends - starts) // NUM_GROUPS)
    steps = torch.arange(NUM_GROUPS, device=borders.device) * size
    plain = torch.minimum(starts + steps, ends)
    shifted = torch.minimum(starts + size // 2 + steps, ends)
    last = borders[-1:].long()
    return tuple(
        torch.unique(torch.cat([starts.reshape(-1), cuts.reshape(-1), last])).to(torch.int32)
        for cuts in (plain, shifted)
    )  # pyright: ignore[reportReturnType]


class _Groups:
    """The groups of the batch under way, worked out once for all layers."""

    def __init__(self) -> None:
        self._of: weakref.ref[torch.Tensor] | None = None
        self._groups: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, borders: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._groups is None or self._of is None or self._of() is not borders:
            self._of, self._groups = weakref.ref(borders), group_borders(borders)
        return self._groups


_GROUPS = _Groups()


def shifted_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' `AttentionInterface`.

    Args:
        module: the attention layer; only in training it attends within groups.
        query: (B, H, T, D); `key`, `value`: (B, K, T, D).
        attention_mask: None where the documents are told by `cu_seq_lens_q`.
        cu_seq_lens_q: int32 borders of the documents in the rows laid end to end; None for one document per row.
        max_length_q: length of the longest document in tokens.

    Returns:
        (B, T, H, D) and None.
    """
    rows, num_heads, q_len, _ = query.shape
    dense = attention_mask is not None or num_heads % 2 or q_len != key.shape[2]
    if not module.training or dense:
        return varlen_attention_forward(
            module, query, key, value, attention_mask, cu_seq_lens_q=cu_seq_lens_q, max_length_q=max_length_q, **kwargs
        )
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, rows * q_len + 1, q_len, dtype=torch.int32, device=query.device)
        max_length_q = q_len
    longest = int(max_length_q) if max_length_q is not None else int(cu_seq_lens_q.diff().max())
    if key.shape[1] % 2:
        key, value = (x.repeat_interleave(num_heads // key.shape[1], dim=1) for x in (key, value))
    halves = zip(
        query.chunk(2, dim=1), key.chunk(2, dim=1), value.chunk(2, dim=1), _GROUPS.of(cu_seq_lens_q), strict=True
    )
    done = [
        varlen_attention_forward(
            module, q, k, v, None, cu_seq_lens_q=borders, max_length_q=-(-longest // NUM_GROUPS), **kwargs
        )[0]
        for q, k, v, borders in halves
    ]
    return torch.cat(done, dim=2), None
