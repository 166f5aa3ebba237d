"""Data collators that pad labels and position_ids, for single rows and for packed bins.

A packed row is several documents one after the other. The label of the first token of each document is -100: the loss
compares the logits of token t with the label of token t + 1, and the last token of a document must not be asked to foretell
the first of the next. With that, packed loss equals unpacked loss. Padding at the end is one more document, all -100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from axolotl.exceptions import ConfigError, TokenizerError
from axolotl.utils.collators.core import IGNORE_INDEX
from axolotl.utils.collators.layout import (
    Row,
    document_borders,
    document_positions,
    join_rows,
    pad_block,
    padded_length,
    token_arrays,
)


@dataclass
class DataCollatorForSeq2Seq:
    """Pads rows to one length, labels and position_ids too.

    Args:
        tokenizer: gives the pad token and the padding side.
        model: when it has `prepare_decoder_input_ids_from_labels` (encoder-decoders), the batch gets its decoder inputs.
        padding: `True` or `"longest"` pads to the longest row, `"max_length"` to `max_length`, `False` not at all.
        max_length: the length for `padding="max_length"`.
        pad_to_multiple_of: round the length of the batch up to a multiple.
        label_pad_token_id: label of padding.
        position_pad_token_id: unused by right padding, whose positions count from 0 again; the value for left padding.
        return_tensors: only `"pt"`.
    """

    tokenizer: PreTrainedTokenizerBase
    model: Any | None = None
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    label_pad_token_id: int = IGNORE_INDEX
    position_pad_token_id: int = 0
    return_tensors: str = "pt"

    def __call__(self, features: Sequence[Row], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        if (return_tensors or self.return_tensors) != "pt":
            raise ConfigError(
                f"collators return PyTorch tensors, so `return_tensors` must be `pt`, not {return_tensors!r}."
            )
        rows = [self._arrays(row) for row in features]
        batch = self._tensors(rows, [len(row["input_ids"]) for row in rows])
        prepare = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if prepare is not None and "labels" in batch:
            batch["decoder_input_ids"] = prepare(labels=batch["labels"])
        return batch

    def _arrays(self, row: Row) -> dict[str, np.ndarray]:
        columns = token_arrays(row)
        if "attention_mask" not in columns:
            columns["attention_mask"] = np.ones(len(columns["input_ids"]), dtype=np.int64)
        return columns

    def _width(self, longest: int) -> int:
        longest = longest or 2  # a batch of empty bins: the least that a shifted loss can read
        if self.padding == "max_length":
            if not self.max_length:
                raise ConfigError('`padding="max_length"` needs `max_length`.')
            longest = max(longest, self.max_length)
        return padded_length(longest, self.pad_to_multiple_of if self.padding else None)

    def _tensors(
        self, rows: list[dict[str, np.ndarray]], lengths: list[int], left: bool | None = None
    ) -> dict[str, Any]:
        width = self._width(max(lengths, default=0))
        if not self.padding and len(set(lengths)) > 1:
            raise ConfigError(f"rows of lengths {sorted(set(lengths))} cannot form a batch with `padding=False`.")
        if left is None:
            left = self.tokenizer.padding_side == "left"
        batch: dict[str, torch.Tensor] = {}
        for name in rows[0]:
            if any(name not in row for row in rows):
                continue
            block = pad_block([row[name] for row in rows], width, self._pad_value(name, lengths, width), left)
            if name == "position_ids" and not left:
                for line, length in zip(block, lengths, strict=True):
                    line[length:] = np.arange(width - length)
            batch[name] = torch.from_numpy(block)
        return batch

    def _pad_value(self, name: str, lengths: list[int], width: int) -> int:
        if name == "labels":
            return self.label_pad_token_id
        if name == "position_ids":
            return self.position_pad_token_id
        if name != "input_ids":
            return 0
        if self.tokenizer.pad_token_id is None:
            if any(length < width for length in lengths):
                raise TokenizerError(
                    "rows of different lengths need padding, but the tokenizer has no pad token. Write "
                    '`special_tokens: {pad_token: "<|pad|>"}`, or name an existing token there.'
                )
            return 0
        return int(self.tokenizer.pad_token_id)


@dataclass
class BatchSamplerDataCollatorForSeq2Seq(DataCollatorForSeq2Seq):
    """Packs the rows of each bin into one row of the batch. For batches of `MultipackBatchSampler`.

    Takes a list of bins (lists of rows), or a list of rows, which is one bin.

    Args:
        varlen: add `cu_seq_lens_q`, `cu_seq_lens_k` (int32 (D + 1,), borders of documents in the batch read row after row),
            `max_length_q` and `max_length_k`, and no attention mask: the attention backend works by borders.
        drop_attention_mask: no attention mask; the backend tells documents apart by position_ids.
    """

    varlen: bool = False
    drop_attention_mask: bool = False

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> dict[str, Any]:
        if (return_tensors or self.return_tensors) != "pt":
            raise ConfigError(
                f"collators return PyTorch tensors, so `return_tensors` must be `pt`, not {return_tensors!r}."
            )
        bins: Sequence[Sequence[Row]] = features if isinstance(features[0], (list, tuple)) else [features]
        lengths = [[len(row["input_ids"]) for row in bin_] for bin_ in bins]
        packed = [self._pack(bin_, bin_lengths) for bin_, bin_lengths in zip(bins, lengths, strict=True)]
        batch = self._tensors(packed, [sum(bin_lengths) for bin_lengths in lengths], left=False)
        if self.varlen:
            borders, longest = document_borders(lengths, batch["input_ids"].shape[1])
            batch["cu_seq_lens_q"] = torch.from_numpy(borders)
            batch["cu_seq_lens_k"] = batch["cu_seq_lens_q"]
            batch["max_length_q"] = batch["max_length_k"] = longest
        if self.varlen or self.drop_attention_mask:
            batch.pop("attention_mask", None)
        return batch

    def _pack(self, rows: Sequence[Row], lengths: list[int]) -> dict[str, np.ndarray]:
        if not rows:  # an empty bin evens out the number of batches over ranks; it is all padding
            return {
                name: np.zeros(0, dtype=np.int64) for name in ("input_ids", "labels", "attention_mask", "position_ids")
            }
        packed = join_rows(rows)
        if "position_ids" not in packed:
            packed["position_ids"] = document_positions(lengths)
        if "labels" in packed:
            packed["labels"] = self._border_labels(packed["labels"], lengths)
        packed["attention_mask"] = self._mask(lengths)
        return packed

    def _border_labels(self, labels: np.ndarray, lengths: list[int]) -> np.ndarray:
        labels = labels.astype(np.int64)
        starts = np.cumsum([0, *lengths[:-1]])
        labels[starts[np.asarray(lengths) > 0]] = self.label_pad_token_id
        return labels

    def _mask(self, lengths: list[int]) -> np.ndarray:
        return np.ones(sum(lengths), dtype=np.int64)


@dataclass
class V2BatchSamplerDataCollatorForSeq2Seq(BatchSamplerDataCollatorForSeq2Seq):
    """As the first version, with the number of the document (1, 2, ...) in the attention mask.

    Args:
        squash_position_ids: positions run through the whole row instead of restarting at each document.
    """

    squash_position_ids: bool = False

    def _pack(self, rows: Sequence[Row], lengths: list[int]) -> dict[str, np.ndarray]:
        packed = super()._pack(rows, lengths)
        if self.squash_position_ids:
            packed["position_ids"] = np.arange(sum(lengths))
        return packed

    def _mask(self, lengths: list[int]) -> np.ndarray:
        return np.repeat(np.arange(1, len(lengths) + 1), lengths)


class PretrainingBatchSamplerDataCollatorForSeq2Seq(V2BatchSamplerDataCollatorForSeq2Seq):
    """Packs streamed pretraining rows.

    Takes bins or rows like the others, and also the columns of the rows of one bin (`{"input_ids": [...], ...}`), as
    `Dataset.map(batched=True)` hands them over.

    Args:
        multipack_attn: `True` keeps documents apart. `False` reads the packed row as one text: positions run on, every token
            sees all before it, and the first token of a document is trained.
    """

    def __init__(self, *args: Any, multipack_attn: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.multipack_attn = multipack_attn

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> dict[str, Any]:
        if isinstance(features, Mapping):
            features = [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]
        if self.multipack_attn or not features:
            return super().__call__(features, return_tensors)
        bins = features if isinstance(features[0], (list, tuple)) else [features]
        return super().__call__([[self._one_text(bin_)] if bin_ else [] for bin_ in bins], return_tensors)

    def _one_text(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        return {name: value for name, value in join_rows(rows).items() if name != "position_ids"}
