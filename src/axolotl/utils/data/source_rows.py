"""Which row of its source a row is, for messages: `split` and `shards` leave out rows before it."""

from __future__ import annotations

import re

from datasets import Dataset

from axolotl.prompt_tokenizers import RowName
from axolotl.utils.data.shared import take_shard
from axolotl.utils.dict import DictDefault

_FROM_ROW = re.compile(r"[^\[+]+(?:\[(\d*):[^\]]*\])?")
"""A split whose first row is known without the number of rows: `train`, `train[:10%]`, `train[100:200]`."""


def name_source_rows(config: DictDefault, num_loaded: int, seed: int) -> RowName:
    """Names for rows of a dataset, as they stand in its source.

    Args:
        config: the entry of `datasets`.
        num_loaded: rows before `take_shard`.
        seed: of `take_shard`.

    Returns:
        A function from an index after `take_shard` to `row 103`, or to `row 3 of split train[50%:]` where nobody knows how many rows
        the split leaves out.
    """
    known = _FROM_ROW.fullmatch(config.split or "train")

    def name(index: int) -> str:
        if config.shards:
            index = take_shard(Dataset.from_dict({"row": range(num_loaded)}), config, seed)[index]["row"]
        return f"row {index + int(known[1] or 0)}" if known else f"row {index} of split {config.split}"

    return name


def name_made_row(index: int) -> str:
    """The name of a row that is not one row of the source: a piece of it, or one of those that a filter kept."""
    return f"row {index} of those made of it"
