"""Where one document of a batch ends and the next begins, worked out once per step, before the first layer.

A batch tells its documents by `cu_seq_lens_*` (packed for a varlen backend), by `position_ids` that start again, or by an
`attention_mask` with padding. What libraries make of these differs: transformers looks at `position_ids` only while there is
neither a mask nor a cache, some of its models not at all, and its flash attention only in batches of one row. The hooks of
`add_document_hook` tell every batch to the backend in the one way that always works: borders for varlen backends, and for the
others a term in every mask that transformers builds. If a model uses neither, packed rows are refused instead of leaking.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionMaskInterface, masking_utils
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    eager_mask,
    flex_attention_mask,
    packed_sequence_mask_function,
    padding_mask_function,
    sdpa_mask,
)

from axolotl.exceptions import ModelError
from axolotl.monkeypatch.attention.layouts import cu_seq_lens, find_layout, read_layout

HOOK_MARK = "_axolotl_document_hook"


@dataclass
class Documents:
    """The documents of the batch that is being computed.

    Attributes:
        ids: (B, T) int64, the same number for the tokens of one document. None where each row is one, padding aside.
        used: whether an attention backend has asked for them.
        is_padded: whether the rows have padding, which the mask tells.
    """

    ids: torch.Tensor | None
    used: bool = False
    is_padded: bool = False


CURRENT: ContextVar[Documents | None] = ContextVar("axolotl_documents", default=None)


def mark_used() -> None:
    """Called by a backend that keeps the documents of this batch apart."""
    documents = CURRENT.get()
    if documents is not None:
        documents.used = True


def documents_of_borders(borders: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The number of the document of each token, (B, T) int64. The inverse of `cu_seq_lens`.

    Args:
        borders: int32 (number of documents + 1,).
        tokens: (B, T) or (B, T, H), whose rows were laid end to end.
    """
    places = torch.arange(tokens.shape[0] * tokens.shape[1], dtype=borders.dtype, device=borders.device)
    return torch.bucketize(places, borders[1:], right=True).view(tokens.shape[:2])


def _build_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, one of transformers' mask builders, with the documents of the batch as one more condition.

    Where rows are known to be padded, so is the padding: transformers would ask the GPU whether there is any.
    """

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        documents = CURRENT.get()
        sizes = (kwargs.get("batch_size"), kwargs.get("q_length"))
        if documents is None:
            return original(*args, **kwargs)
        if documents.is_padded:
            return original(*args, **_with_padding(kwargs))
        if documents.ids is None:
            return original(*args, **kwargs)
        if sizes != tuple(documents.ids.shape) or kwargs.get("kv_length") != sizes[1]:
            return original(*args, **kwargs)
        documents.used = True
        together = packed_sequence_mask_function(documents.ids)
        kwargs["mask_function"] = and_masks(kwargs.get("mask_function", causal_mask_function), together)
        kwargs["allow_is_causal_skip"] = False
        return original(*args, **kwargs)

    return build


def _with_padding(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a mask builder with the padding in its function, where a mask of all keys is given and there is no cache.

    That is what a builder does itself when it has found padding. Where this mask, against expectation, has none, the result
    is a mask written out instead of none.
    """
    mask, kv_length = kwargs.get("attention_mask"), kwargs.get("kv_length")
    whole = isinstance(mask, torch.Tensor) and tuple(mask.shape) == (kwargs.get("batch_size"), kv_length)
    if not whole or kwargs.get("q_length") != kv_length or kwargs.get("kv_offset", 0) != 0:
        return kwargs
    function = and_masks(kwargs.get("mask_function", causal_mask_function), padding_mask_function(mask))
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return {**kwargs, **skips, "mask_function": function, "attention_mask": None}


MASK_BUILDERS = {
    name: _build_mask(builder)
    for name, builder in (("sdpa", sdpa_mask), ("eager", eager_mask), ("flex_attention", flex_attention_mask))
}


def register_masks() -> None:
    """Let transformers build the masks of `sdpa`, `eager` and `flex_attention` with documents. Safe to call again."""
    for name, builder in MASK_BUILDERS.items():
        AttentionMaskInterface.register(name, builder)


def find_documents_once() -> None:
    """Keep transformers from looking for documents where they have been told: it waits for the GPU. Safe to call again."""
    search = masking_utils.find_packed_sequence_indices
    if hasattr(search, "__wrapped__"):
        return

    @functools.wraps(search)
    def search_unless_told(position_ids: torch.Tensor) -> torch.Tensor | None:
        return None if CURRENT.get() is not None else search(position_ids)

    masking_utils.find_packed_sequence_indices = search_unless_told


def _tensors(args: tuple, kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The candidates for the tokens of a batch, whose first dimension is its number of rows."""
    yield from (value for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if value is not None)


class DocumentHook:
    """The hooks that one module carries: before its forward the documents are told, afterwards they are forgotten.

    A module inside one that has told its documents adds nothing.

    Attributes:
        varlen: whether the backend takes `cu_seq_lens_*`.
        checked: whether the backend reports that it used the documents; the flash-attn packages do not.
    """

    def __init__(self, *, varlen: bool, checked: bool):
        self.varlen = varlen
        self.checked = checked
        self._tokens: list[Token[Documents | None] | None] = []

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        self._tokens.append(None)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if CURRENT.get() is not None or kwargs.get("past_key_values") is not None:
            return None
        if self.varlen and kwargs.get("cu_seq_lens_q") is not None:
            ids = documents_of_borders(kwargs["cu_seq_lens_q"], next(_tensors(args, kwargs)))
            self._tokens[-1] = CURRENT.set(Documents(ids))
            return None
        if mask is None and positions is None:
            self._tokens[-1] = CURRENT.set(Documents(ids=None, used=True))
            return None
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            return None
        if positions is not None and positions.dim() != 2:
            return None
        layout = find_layout(positions, mask)
        if positions is not None:
            positions = positions.expand(next(_tensors(args, kwargs)).shape[0], -1)
        if layout is None:
            layout = read_layout(positions, mask)
        if layout.is_torn:
            raise ModelError(
                "A batch has packed documents with padding inside one of them. Put padding at the end of a row."
            )
        starts = layout.starts
        if starts is None or not (layout.is_packed or self.varlen):
            if layout.is_padded:
                self._tokens[-1] = CURRENT.set(Documents(ids=None, used=True, is_padded=True))
                return None
            if positions is not None and mask is None and not self.varlen:
                # Without a mask transformers would take a skipped position for the border of a document.
                return args, {**kwargs, "attention_mask": torch.ones_like(positions)}
            return None
        self._tokens[-1] = CURRENT.set(Documents(starts.cumsum(1)))
        if not self.varlen:
            return args, {**kwargs, "attention_mask": torch.ones_like(starts, dtype=torch.int64), "use_cache": False}
        borders, longest = layout.borders or cu_seq_lens(starts)
        told_by_borders = {
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return args, {**kwargs, "attention_mask": None, "use_cache": False, **told_by_borders}

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        token = self._tokens.pop()
        if token is None:
            return
        documents = CURRENT.get()
        CURRENT.reset(token)
        if output is not None and self.checked and documents is not None and not documents.used:
            masked = "`attn_implementation: sdpa` with `sdpa_varlen: false`, or " if self.varlen else ""
            raise ModelError(
                f"{type(module).__name__} does not take its attention (or its masks) from transformers' interfaces, or does not hand "
                "the borders of documents down to it, so that packed documents would see each other. Write "
                f"{masked}`sample_packing: false`."
            )


def add_document_hook(model: nn.Module, *, varlen: bool, checked: bool = True) -> None:
    """Tell the documents of each batch to the attention backend of `model`. Adding it twice changes nothing.

    They stand on the model itself and on its decoder. Some models call the layers of their decoder past its `forward`, or never
    hand it the positions, so that only the model is told; peft calls the `forward` of the model directly, past its hooks, so
    that only the decoder is. A peft model gets hooks of its own, which serve both.

    Args:
        model: a transformers model, or a peft model around one.
        varlen: whether the backend takes `cu_seq_lens_*`; otherwise it takes masks.
        checked: whether the backend reports by `mark_used`.
    """
    decoder = model.base_model if isinstance(getattr(model, "base_model", None), nn.Module) else model
    for module in dict.fromkeys((model, decoder)):
        if HOOK_MARK in vars(module):
            continue
        hook = DocumentHook(varlen=varlen, checked=checked)
        module.register_forward_pre_hook(hook.before, with_kwargs=True)
        module.register_forward_hook(hook.after, always_call=True)
        setattr(module, HOOK_MARK, hook)
