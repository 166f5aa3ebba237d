"""Where one document of a batch ends and the next begins, worked out once per step, before the first layer.

A batch tells its documents by `cu_seq_lens_*` (packed for a varlen backend), by `position_ids` that start again, or by an
`attention_mask` with padding. Backends disagree about which of these they look at: transformers' mask functions look at
`position_ids` only while there is neither an attention mask nor a cache, and its flash attention only in batches of one
row. `add_document_hook` puts every batch into the one form that the model's backend reads, so that packed documents cannot
see each other on any of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from axolotl.exceptions import ModelError

HOOK_MARK = "_axolotl_document_hook"


def document_starts(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which tokens begin a document.

    Args:
        position_ids: (B, T) int64; a document begins where the position does not grow. A jump forward stays in the
            document (PoSE skips positions inside one).
        attention_mask: (B, T), 0 for padding. A run of padding is a document of its own.

    Returns:
        (B, T) bool, True in the first column, or None when neither argument is given.
    """
    given = position_ids if position_ids is not None else attention_mask
    if given is None:
        return None
    starts = torch.zeros(given.shape, dtype=torch.bool, device=given.device)
    starts[:, 0] = True
    if position_ids is not None:
        starts[:, 1:] |= position_ids[:, 1:] <= position_ids[:, :-1]
    if attention_mask is not None:
        real = attention_mask != 0
        starts[:, 1:] |= real[:, 1:] != real[:, :-1]
    return starts


def cu_seq_lens(starts: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Borders of the documents of a batch whose rows are laid end to end.

    Args:
        starts: (B, T) bool, True where a document begins; True in the first column.

    Returns:
        borders, int32 (number of documents + 1,), and the length of the longest document in tokens.
    """
    end = torch.full((1,), starts.numel(), dtype=torch.int64, device=starts.device)
    borders = torch.cat([starts.reshape(-1).nonzero().squeeze(-1), end])
    return borders.to(torch.int32), int(borders.diff().max())


def _documents_for_varlen(kwargs: dict[str, Any], position_ids: torch.Tensor | None, mask: torch.Tensor | None) -> dict:
    """The batch with `cu_seq_lens_*` in place of the mask, or as it was when every row is one document."""
    starts = document_starts(position_ids, mask)
    if starts is None:
        return kwargs
    torn = torch.zeros((), dtype=torch.bool, device=starts.device)
    if mask is not None:
        real = mask != 0
        # A document with padding inside it cannot be told by borders; the backend then reads the mask itself.
        torn = ((real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0] > 1).any()
    split, is_torn = torch.stack([starts[:, 1:].any(), torn]).tolist()
    if not split or is_torn:
        return kwargs
    borders, longest = cu_seq_lens(starts)
    return {
        **kwargs,
        "attention_mask": None,
        "use_cache": False,
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _documents_for_masks(kwargs: dict[str, Any], position_ids: torch.Tensor | None, mask: torch.Tensor | None) -> dict:
    """The batch so that transformers' `create_causal_mask` sees its documents: no mask and no cache beside them."""
    if position_ids is None or position_ids.shape[1] < 2:
        return kwargs
    step = position_ids[:, 1:] - position_ids[:, :-1]
    real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask != 0
    joined = (~real[:, :-1] & real[:, 1:] & (step == 1)).any()
    restarts, skips, padding_joined = torch.stack([(step <= 0).any(), (step > 1).any(), joined]).tolist()
    if restarts and (skips or padding_joined):
        what = "skip positions inside a document (`use_pose`)" if skips else "have padding in front of a document"
        raise ModelError(
            f"Packed rows that {what} cannot be told apart by this `attn_implementation`. Write `flash_attention: true`, "
            "or `sample_packing: false`."
        )
    if restarts:
        return {**kwargs, "attention_mask": None, "use_cache": False}
    if skips and mask is None:
        # Without a mask transformers would take each skipped position for the border of a document.
        return {**kwargs, "attention_mask": torch.ones_like(position_ids)}
    return kwargs


def add_document_hook(model: nn.Module, *, varlen: bool) -> None:
    """Let `model` rewrite each batch into the form that its attention backend reads. Adding it twice changes nothing.

    The hook stands on the decoder and not on the head, because peft calls the head's `forward` directly.

    Args:
        model: a transformers model.
        varlen: whether the backend takes `cu_seq_lens_*`; otherwise it takes masks.
    """
    decoder = model.base_model if isinstance(getattr(model, "base_model", None), nn.Module) else model
    if HOOK_MARK in vars(decoder):
        return
    rewrite = _documents_for_varlen if varlen else _documents_for_masks

    def documents_hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        told = varlen and kwargs.get("cu_seq_lens_q") is not None
        if told or kwargs.get("past_key_values") is not None:
            return None
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            return None
        if position_ids is not None:
            if position_ids.dim() != 2:
                return None
            tokens = next(
                given for given in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if given is not None
            )
            position_ids = position_ids.expand(tokens.shape[0], -1)
        return args, rewrite(kwargs, position_ids, mask)

    handle = decoder.register_forward_pre_hook(documents_hook, with_kwargs=True)
    setattr(decoder, HOOK_MARK, handle)
