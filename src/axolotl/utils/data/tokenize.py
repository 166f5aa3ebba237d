"""Rows of a source into rows of tokens, through the strategy that `type` names."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from datasets import Dataset

from axolotl import prompt_strategies
from axolotl.datasets import TokenizedPromptDataset
from axolotl.exceptions import AxolotlError, DatasetError
from axolotl.prompt_tokenizers import DatasetWrappingStrategy, RowName, name_row
from axolotl.utils.data.rows import check_token_columns
from axolotl.utils.dict import DictDefault

ROWS_PER_PROCESS = 2_000
"""Rows that make up for the start of one more process, which is a fork and takes a twentieth of a second."""

TOKEN_COLUMNS = frozenset({"input_ids", "labels"})


def dataset_name(config: DictDefault) -> str:
    """A dataset as the user wrote it, for messages."""
    parts = [f"`path: {config.path}`"]
    parts += [f"`{key}: {config[key]}`" for key in ("name", "split", "type") if isinstance(config[key], (str, int))]
    return " ".join(parts)


def num_workers(num_rows: int, wanted: int | None) -> int:
    """Processes that tokenize, at most one per core. Few rows take one: a process costs more to start than it saves."""
    return max(1, min(int(wanted or os.cpu_count() or 1), num_rows // ROWS_PER_PROCESS))


def tokenize_dataset(
    raw: Dataset,
    config: DictDefault,
    cfg: DictDefault,
    tokenizer: Any,
    processor: Any = None,
    name_row: RowName = name_row,
) -> Dataset:
    """Tokens of every row. Rows that hold `input_ids` and `labels` already are taken as they are.

    Errors call rows by `name_row`.

    Raises:
        DatasetError: names the dataset; the strategy names row and field.
    """
    name = dataset_name(config)
    if TOKEN_COLUMNS.issubset(raw.column_names):
        check_token_columns(raw, name, name_row)
        return _with_attention_mask(raw)
    if not config.type:
        raise DatasetError(
            f"dataset {name} has no `type`, and its rows hold no `input_ids` and `labels` (fields: "
            f"{', '.join(raw.column_names)}). Write a `type`, such as `alpaca` or `chat_template`."
        )
    strategy = prompt_strategies.load(config.type, tokenizer, cfg, config, processor=processor)
    process_count, keep_in_memory = num_workers(len(raw), cfg.dataset_num_proc), bool(cfg.dataset_keep_in_memory)
    try:
        if isinstance(strategy, DatasetWrappingStrategy):
            return strategy.wrap_dataset(raw, process_count=process_count, keep_in_memory=keep_in_memory)
        return TokenizedPromptDataset(
            strategy, raw, process_count, keep_in_memory, name=str(config.path), name_row=name_row
        )
    except AxolotlError as error:
        if str(config.path) in str(error):
            raise
        raise type(error)(f"dataset {name}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DatasetError(
            f"dataset {name}: a row cannot be turned into tokens ({type(error).__name__}: {error}). Its fields are: "
            f"{', '.join(raw.column_names)}. Check `type` and the `field_...` keys."
        ) from error


def _with_attention_mask(raw: Dataset) -> Dataset:
    if "attention_mask" in raw.column_names:
        return raw
    masks = raw.select_columns("input_ids").map(
        lambda rows: {"attention_mask": [np.ones(len(ids), dtype=np.int8) for ids in rows["input_ids"]]},
        batched=True,
        remove_columns="input_ids",
    )
    return raw.add_column("attention_mask", masks["attention_mask"][:])
