"""Shared utils for the monkeypatches: where documents begin and end, read from masks and positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _borders(starts_T: torch.Tensor) -> torch.Tensor:
    """Cumulative lengths of the documents of one row, int32 (D + 1,)."""
    end = torch.tensor([starts_T.numel()], device=starts_T.device)
    return torch.cat([starts_T.nonzero().flatten(), end]).to(torch.int32)


def _stack(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Borders of all rows as one tensor, rows with fewer documents filled up with their last border (empty documents)."""
    longest = torch.stack([row.diff().max() for row in rows])
    most = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, most - len(row)), value=int(row[-1])) for row in rows]), longest


def get_max_seqlen_in_batch(attention_mask: torch.Tensor) -> torch.Tensor:
    """Lengths of all documents of a batch, row after row.

    Args:
        attention_mask: (B, T), the number of the document (1, 2, ...) at each token, 0 for padding.

    Returns:
        int32, one length per document.
    """
    counts = torch.stack(
        [(attention_mask == number).sum(-1) for number in range(1, int(attention_mask.max()) + 1)], dim=-1
    )
    return counts.flatten()[counts.flatten() > 0].to(torch.int32)


def get_cu_seqlens(attn_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate a cumulative sequence length mask for flash attention using attn mask.

    Args:
        attn_mask: (B, T), the number of the document (1, 2, ...) at each token; a run of 0 is padding, one document more.

    Returns:
        `(borders, longest)`: int32 (B, D + 1) and int32 (B,), the longest document of each row.
    """
    if attn_mask.dim() == 1:
        attn_mask = attn_mask.unsqueeze(0)
    starts = F.pad(attn_mask[:, 1:] != attn_mask[:, :-1], (1, 0), value=True)
    return _stack([_borders(row) for row in starts])


def get_cu_seqlens_from_pos_ids(position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate a cumulative sequence length mask for flash attention using pos ids.

    Args:
        position_ids: (B, T). A document begins where positions do not grow. A run of zeros at the end is padding, one
            document.

    Returns:
        `(borders, longest)`: int32 (B, D + 1) and int32 (B,), the longest document of each row.
    """
    if position_ids.dim() == 1:
        position_ids = position_ids.unsqueeze(0)
    starts = F.pad(position_ids[:, 1:] <= position_ids[:, :-1], (1, 0), value=True)
    padding = (position_ids.flip(-1) == 0).cumprod(-1).flip(-1).bool()
    starts &= ~F.pad(padding[:, :-1], (1, 0), value=False)
    return _stack([_borders(row) for row in starts])


def mask_2d_to_4d(mask: torch.Tensor, dtype: torch.dtype, tgt_len: int | None = None) -> torch.Tensor:
    """Expands attention_mask from [bsz, seq_len] to [bsz, 1, tgt_seq_len, src_seq_len].

    This expansion handles packed sequences so that sequences share the same attention mask integer value when they attend to
    each other within that sequence. This expansion transforms the mask to lower triangular form to prevent future peeking.

    Args:
        mask: (B, S), the number of the document at each token, 0 for padding.
        dtype: of the result.
        tgt_len: number of query tokens, the last of the sequence; all by default.

    Returns:
        (B, 1, tgt_len, S): 1 where a query may see a key, else 0.
    """
    length = mask.shape[1]
    tgt_len = length if tgt_len is None else tgt_len
    queries = torch.arange(length - tgt_len, length, device=mask.device)
    same = mask[:, None, queries, None] == mask[:, None, None, :]
    real = (mask != 0)[:, None, None, :]
    past = queries[:, None] >= torch.arange(length, device=mask.device)[None, :]
    return (same & real & past).to(dtype)
