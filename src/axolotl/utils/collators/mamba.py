"""Collator for State Space Models (Mamba)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from axolotl.utils.collators.core import IGNORE_INDEX
from axolotl.utils.collators.layout import Row, pad_block


@dataclass
class MambaDataCollator:
    """Pads `input_ids` with the pad token and `labels` with -100, on the right. Mamba takes no attention mask.

    Args:
        tokenizer: gives the pad token; without one, 0 pads, which causal layers and -100 labels keep without effect.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, instances: Sequence[Row]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in instances)
        ids = [np.asarray(row["input_ids"]) for row in instances]
        labels = [np.asarray(row["labels"]) for row in instances]
        return {
            "input_ids": torch.from_numpy(pad_block(ids, width, self.tokenizer.pad_token_id or 0)),
            "labels": torch.from_numpy(pad_block(labels, width, IGNORE_INDEX)),
        }
