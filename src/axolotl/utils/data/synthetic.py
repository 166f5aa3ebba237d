"""Rows of random tokens, for measuring speed and memory (`type: _synthetic`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from axolotl.exceptions import DatasetError
from axolotl.utils.dict import DictDefault

SYNTHETIC = "_synthetic"


def synthetic_rows(entry: DictDefault, cfg: DictDefault, tokenizer: Any) -> Dataset:
    """Random tokens, all of them trained.

    Args:
        entry: `length` rows (1000) of `sequence_length` tokens (`sequence_len` of the config), ids from `min_input_id` (100) up to but not
            including `max_input_id` (the size of the vocabulary), drawn with `seed` (that of the config).
        cfg: the config.
        tokenizer: gives the size of the vocabulary.

    Raises:
        DatasetError: there are no token ids between the two.
    """
    num_rows = int(entry.length or 1000)
    num_tokens = int(entry.sequence_length or cfg.sequence_len or 512)
    highest = int(entry.max_input_id or len(tokenizer))
    lowest = min(100, highest - 1) if entry.min_input_id is None else int(entry.min_input_id)
    if lowest >= highest:
        raise DatasetError(
            f"`min_input_id: {lowest}` of dataset `path: {entry.path}` must be below {highest}, which is `max_input_id` or the size of the "
            "vocabulary."
        )
    seed = int((cfg.seed if entry.seed is None else entry.seed) or 0)
    ids = np.random.default_rng(seed).integers(lowest, highest, (num_rows, num_tokens))
    return Dataset.from_dict({"input_ids": list(ids), "labels": list(ids), "attention_mask": list(np.ones_like(ids))})
