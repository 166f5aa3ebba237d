"""What the positions and the attention mask of a batch say of its documents and its padding.

Reading them makes the CPU wait where they are on an accelerator. Who has had the batch in host memory reads them there, and tells
the model by `told_layouts`, for the tensors that were sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

Identity = tuple[int, int]


def identity(tensor: torch.Tensor) -> Identity:
    """Tells a tensor from others that are alive, and from itself before it was written to."""
    return id(tensor), tensor._version


@dataclass(frozen=True)
class Layout:
    """Documents and padding of a batch.

    Attributes:
        starts: (B, T) bool, True where a document begins, and in the first column. None when every row is one document without
            padding, and for a document with padding inside it, which borders cannot tell.
        is_packed: whether rows hold several documents, padding aside.
        is_padded: whether the mask hides tokens.
        is_torn: whether there is padding inside of a document of a packed row.
        borders: the borders of the documents and the length of the longest, as `cu_seq_lens` gives them, where they are known.
    """

    starts: torch.Tensor | None
    is_packed: bool = False
    is_padded: bool = False
    is_torn: bool = False
    borders: tuple[torch.Tensor, int] | None = None


def read_layout(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> Layout:
    """Read a batch. On an accelerator it waits once.

    Args:
        position_ids: (B, T) int64; a document begins where the position does not grow. A jump forward stays in the
            document (PoSE skips positions inside one).
        attention_mask: (B, T), 0 for padding. A run of padding is a document of its own.
    """
    given = position_ids if position_ids is not None else attention_mask
    if given is None or given.shape[1] < 2:
        return Layout(None)
    restarts = torch.zeros_like(given[:, 1:], dtype=torch.bool)
    changes, torn, packed, hidden = restarts, restarts, restarts, restarts
    if position_ids is not None:
        restarts = packed = position_ids[:, 1:] <= position_ids[:, :-1]
    if attention_mask is not None:
        real = attention_mask != 0
        hidden = ~real
        earlier = real[:, :-1].cummax(dim=1).values
        changes = real[:, 1:] != real[:, :-1]
        torn = changes & real[:, 1:] & earlier & ~restarts
        packed = restarts & real[:, 1:] & earlier
    flags = torch.stack([(restarts | changes).any(), torn.any(), packed.any(), hidden.any()])
    is_split, is_torn, is_packed, is_padded = flags.tolist()
    if is_torn or not is_split:
        return Layout(None, is_packed, is_padded, is_torn and is_packed)
    starts = torch.cat([torch.ones_like(restarts[:, :1]), restarts | changes], dim=1)
    return Layout(starts, is_packed, is_padded)


def cu_seq_lens(starts: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Borders of the documents of a batch whose rows are laid end to end. On an accelerator it waits.

    Args:
        starts: (B, T) bool, True where a document begins; True in the first column.

    Returns:
        borders, int32 (number of documents + 1,), and the length of the longest document in tokens.
    """
    end = torch.full((1,), starts.numel(), dtype=torch.int64, device=starts.device)
    borders = torch.cat([starts.reshape(-1).nonzero().squeeze(-1), end])
    return borders.to(torch.int32), int(borders.diff().max())


def read_batch(batch: Mapping[str, Any]) -> Layout | None:
    """The layout of a batch in host memory, borders included; None where it has no mask or positions of one number a token,
    or tells its borders itself."""
    tokens, positions, mask = (batch.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
    given = [tensor for tensor in (positions, mask) if tensor is not None]
    if not given or batch.get("cu_seq_lens_q") is not None:
        return None
    if not all(isinstance(tensor, torch.Tensor) and tensor.dim() == 2 for tensor in (tokens, *given)):
        return None
    layout = read_layout(None if positions is None else positions.expand(tokens.shape[0], -1), mask)
    if layout.starts is None:
        return layout
    return Layout(layout.starts, layout.is_packed, layout.is_padded, borders=cu_seq_lens(layout.starts))


Key = tuple[Identity | None, Identity | None]
TOLD: ContextVar[Mapping[Key, Layout] | None] = ContextVar("axolotl_layouts", default=None)


def key_of(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> Key:
    """Under which the layout of a batch is told. Its tensors have to be kept for as long."""
    positions, mask = (None if tensor is None else identity(tensor) for tensor in (position_ids, attention_mask))
    return positions, mask


@contextmanager
def told_layouts(layouts: Mapping[Key, Layout]) -> Iterator[None]:
    """Within the context, models do not read the batches whose layouts are given."""
    token = TOLD.set(layouts)
    try:
        yield
    finally:
        TOLD.reset(token)


def find_layout(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> Layout | None:
    """The layout that was told for these tensors, or None."""
    return (TOLD.get() or {}).get(key_of(position_ids, attention_mask))
