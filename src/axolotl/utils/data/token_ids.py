"""Whether the numbers of tokenized rows are tokens that the model has.

A lookup beyond the embedding is an assert on a GPU: it ends the process, and names neither row nor number. Rows that are
tokens already, and those of strategies of the user's own, are looked at here, where they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from axolotl.exceptions import DatasetError
from axolotl.prompt_tokenizers import RowName, name_row
from axolotl.utils.data.rows import IGNORE_INDEX, list_chunks
from axolotl.utils.dict import DictDefault
from axolotl.utils.tokenization import embedding_rows

COLUMNS: tuple[tuple[str, int | None], ...] = (("input_ids", None), ("labels", IGNORE_INDEX))
"""Columns of token ids, and the negative number that may stand in each."""


@dataclass(frozen=True)
class LargestToken:
    """The largest number of a dataset, and where it is first found."""

    token: int = -1
    row: str = ""
    column: str = ""


@dataclass(frozen=True)
class Embedding:
    """The embedding that a run will train with.

    Attributes:
        num_rows: tokens that it has a row for.
        text: what it is called in messages.
        remedy: what to write for more rows.
    """

    num_rows: int
    text: str
    remedy: str

    def check(self, name: str, largest: LargestToken) -> None:
        """Raise `DatasetError` where the embedding has no row for a token. Names dataset, row, field and number."""
        if largest.token >= self.num_rows:
            raise DatasetError(
                f"dataset {name}, {largest.row}: `{largest.column}` has the token {largest.token}, but {self.text} has "
                f"{self.num_rows:,} rows, for the tokens 0 to {self.num_rows - 1}. {self.remedy}"
            )


def read_embedding(cfg: DictDefault, tokenizer: Any) -> Embedding | None:
    """The embedding that the model of a config will have; None where its size is not known or is not the limit.

    A model that takes images or sound may have numbers beyond its embedding stand for them.
    """
    present = cfg.model_vocab_size
    if present is None or tokenizer is None or cfg.is_multimodal:
        return None
    num_tokens, shrinks, to_32x = len(tokenizer), bool(cfg.shrink_embeddings), bool(cfg.resize_token_embeddings_to_32x)
    num_rows = embedding_rows(present, num_tokens, to_32x=to_32x, shrinks=shrinks)
    remedies = [
        "Were the rows made with another tokenizer? Then write it as `tokenizer_config`, or train the model that it belongs to",
        "tokens that were added to it are named under `tokens`, which gives the embedding a row for each",
    ]
    if num_rows < present:
        remedies.append(f"without `shrink_embeddings` it keeps its {present:,} rows")
    rounded = embedding_rows(present, num_tokens, to_32x=True, shrinks=shrinks)
    if rounded > num_rows:
        remedies.append(f"`resize_token_embeddings_to_32x: true` rounds it up to {rounded:,} rows")
    return Embedding(num_rows, f"the embedding of `base_model: {cfg.base_model}`", "; ".join(remedies) + ".")


def holds_token_ids(dataset: Dataset) -> bool:
    """Whether the columns of token ids that a dataset has are lists of integers."""
    types = [dataset.data.schema.field(column).type for column, _ in COLUMNS if column in dataset.column_names]
    return bool(types) and all(pa.types.is_list(one) and pa.types.is_integer(one.value_type) for one in types)


def find_largest_token(dataset: Dataset, name: str, name_row: RowName = name_row) -> LargestToken:
    """The largest number among the tokens and labels of a dataset.

    Whole columns are looked at through their Arrow offsets. `name_row` is what errors call a row.

    Raises:
        DatasetError: a number is negative that stands for nothing. Names dataset, row and field.
    """
    largest = LargestToken()
    for column, ignored in COLUMNS:
        if column not in dataset.column_names:
            continue
        negative = _of_rows(dataset, column, lambda ids, ignored=ignored: _is_negative(ids, ignored), np.logical_or)
        if negative.any():
            raise DatasetError(_negative(name, name_row(int(np.argmax(negative))), column))
        tokens = _of_rows(dataset, column, lambda ids: ids, np.maximum)
        if len(tokens) and (token := int(tokens.max())) > largest.token:
            largest = LargestToken(token, name_row(int(np.argmax(tokens))), column)
    return largest


def check_row_tokens(
    rows: Sequence[Mapping[str, np.ndarray]], name: str, embedding: Embedding | None, name_row: RowName = name_row
) -> None:
    """As `find_largest_token` and `Embedding.check`, for some rows of arrays.

    Raises:
        DatasetError: a number stands for no token of the model.
    """
    for column, ignored in COLUMNS:
        filled = [(index, row[column]) for index, row in enumerate(rows) if len(row.get(column, ()))]
        if not filled:
            continue
        together = np.concatenate([ids for _, ids in filled])
        if _is_negative(together, ignored).any():
            index = next(index for index, ids in filled if _is_negative(ids, ignored).any())
            raise DatasetError(_negative(name, name_row(index), column))
        token = int(together.max())
        if embedding is not None and token >= embedding.num_rows:
            index = next(index for index, ids in filled if token in ids)
            embedding.check(name, LargestToken(token, name_row(index), column))


def _negative(name: str, row: str, column: str) -> str:
    return f"dataset {name}, {row}: `{column}` has a negative number that stands for no token."


def _is_negative(ids: np.ndarray, ignored: int | None) -> np.ndarray:
    negative = ids < 0
    return negative if ignored is None else negative & (ids != ignored)


def _of_rows(dataset: Dataset, column: str, of_token: Callable[[np.ndarray], np.ndarray], join: np.ufunc) -> np.ndarray:
    """For each row, what `of_token` says of its numbers, joined. Rows without any get 0."""
    found = []
    for values, offsets in list_chunks(dataset, column):
        said = of_token(values)
        of_rows = np.zeros(len(offsets) - 1, dtype=said.dtype)
        filled = offsets[1:] > offsets[:-1]
        if filled.any() and (said.dtype != bool or said.any()):
            of_rows[filled] = join.reduceat(said, offsets[:-1][filled])
        found.append(of_rows)
    rows = np.concatenate(found) if found else np.zeros(0, bool)
    return rows if dataset._indices is None else rows[dataset._indices.column(0).to_numpy()]
