"""Module containing dataset functionality.

In: a `datasets.Dataset` of rows and a tokenizing strategy. Out: a dataset of `input_ids`, `attention_mask`, `labels`.
Whatever goes wrong in a row becomes a `DatasetError` that names the dataset, the row and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import numpy as np
from datasets import Dataset, IterableDataset

from axolotl.core.datasets.map_rows import map_rows
from axolotl.exceptions import AxolotlError, DatasetError
from axolotl.prompt_tokenizers import PromptTokenizingStrategy, RowName, name_row

BATCH_SIZE = 1000

ROW_ERRORS = (
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    jinja2.TemplateError,
    AssertionError,
)
"""What a row of an unforeseen shape makes a strategy raise."""


class TokenizeRows:
    """What `Dataset.map` calls: tokenizes rows and says which one failed.

    Args:
        strategy: the tokenizing strategy.
        name: the dataset as the user wrote it.
        name_row: what errors call a row, from its index.
    """

    def __init__(self, strategy: PromptTokenizingStrategy, name: str | None = None, name_row: RowName = name_row):
        self.strategy = strategy
        self.name = name
        self.name_row = name_row
        strategy.name_row = name_row

    def __call__(self, rows: dict[str, Any], indices: int | list[int]) -> dict[str, Any]:
        self.strategy.row_offset = indices if isinstance(indices, int) else indices[0]
        batch_error: Exception
        try:
            tokenized = self.strategy.tokenize_prompt(rows)
            if isinstance(indices, int) or not _is_one_row(tokenized):
                return tokenized
            batch_error = ValueError("the strategy took the rows of a batch for one row")
        except ROW_ERRORS as error:
            if isinstance(indices, int):
                raise self._explained(error, indices, rows) from error
            batch_error = error
        for position, index in enumerate(indices):
            row = {key: values[position] for key, values in rows.items()}
            try:
                if _is_one_row(self.strategy.tokenize_prompt({key: [value] for key, value in row.items()})):
                    self.strategy.tokenize_prompt(row)
            except ROW_ERRORS as error:
                raise self._explained(error, index, row) from error
        raise self._explained(batch_error, indices[0], {}) from batch_error

    def blocks(self, rows: dict[str, list], indices: list[int]) -> Mapping[str, Any]:
        """Tokenize a block of rows, one by one where the strategy takes them so."""
        if self.strategy.supports_batched:
            return self(rows, indices)
        tokenized = [
            self({key: values[position] for key, values in rows.items()}, index)
            for position, index in enumerate(indices)
        ]
        columns = dict.fromkeys(key for row in tokenized for key in row)
        return {key: [row.get(key) for row in tokenized] for key in columns}

    def _explained(self, error: Exception, index: int, row: dict[str, Any]) -> DatasetError:
        where = capitalized(self.name_row(index)) + (f" of `{self.name}`" if self.name else "")
        fields = ", ".join(f"`{key}`" for key in row)
        if isinstance(error, AxolotlError):
            return DatasetError(f"{where}: {error}")
        if isinstance(error, KeyError):
            return DatasetError(
                f"{where} has no field `{error.args[0] if error.args else '?'}`; its fields are {fields}. "
                "Rename the field, or name it in the config where the dataset type has a key for it."
            )
        return DatasetError(f"{where} cannot be tokenized: {type(error).__name__}: {error}. Its fields are {fields}.")


def capitalized(text: str) -> str:
    """A text as the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def _name_kept(named: RowName, kept: np.ndarray) -> RowName:
    """The names of rows of which only those with the numbers `kept` are left."""
    return lambda index: named(int(kept[index]))


def _is_one_row(tokenized: Any) -> bool:
    """Whether the tokens are those of one row, not a list of them for each row of a batch."""
    ids = tokenized.get("input_ids")
    return isinstance(ids, list) and bool(ids) and isinstance(ids[0], int)


class TokenizedPromptDataset(Dataset):
    """Dataset that returns tokenized prompts from a stream of text files.

    Args:
        prompt_tokenizer: the strategy that tokenizes the rows of this dataset.
        dataset: the rows.
        process_count: number of processes to use for tokenizing.
        keep_in_memory: whether to keep the tokenized dataset in memory.
        kwargs: passed to `datasets.Dataset`, but for `name` and `name_row`, by which errors call the dataset and its rows.
    """

    def __init__(
        self,
        prompt_tokenizer: PromptTokenizingStrategy,
        dataset: Dataset,
        process_count: int | None = None,
        keep_in_memory: bool | None = False,
        **kwargs,
    ):
        self.prompt_tokenizer = prompt_tokenizer
        self.process_count = process_count
        self.keep_in_memory = keep_in_memory
        self._dataset_name = kwargs.pop("name", None)
        self._name_row: RowName = kwargs.pop("name_row", name_row)
        self.num_filtered = 0
        rows = self.process(dataset)
        # Without a fingerprint `Dataset` makes one of everything that this object holds: it would pickle the tokenizer.
        super().__init__(rows.data, **{"fingerprint": rows._fingerprint, **kwargs})

    def process(self, dataset: Dataset) -> Dataset:
        """`dataset`, tokenized."""
        strategy = self.prompt_tokenizer
        if isinstance(strategy, PromptTokenizingStrategy) and strategy.named_properties is not None:
            strategy.named_properties.check(dataset)
        named = self._name_row
        if self.prompt_tokenizer.filter_rows and len(dataset):
            kept = self._find_kept(dataset, self.prompt_tokenizer.filter_rows)
            self.num_filtered = len(dataset) - len(kept)
            dataset = dataset.select(kept)
            named = _name_kept(self._name_row, kept)
        return map_rows(
            dataset,
            TokenizeRows(self.prompt_tokenizer, self._dataset_name, named).blocks,
            num_proc=self.process_count or 1,
            keep_in_memory=bool(self.keep_in_memory),
            desc="Tokenizing Prompts",
        )

    def _find_kept(self, dataset: Dataset, keeps: Callable[[dict[str, Any]], bool]) -> np.ndarray:
        """The numbers of the rows that a strategy keeps. `Dataset.filter` would leave processes behind when this one is killed."""

        def ask(rows: dict[str, list], numbers: list[int]) -> dict[str, list]:
            rows_of_block = ({name: values[i] for name, values in rows.items()} for i in range(len(numbers)))
            return {"kept": [bool(keeps(row)) for row in rows_of_block]}

        answers = map_rows(dataset, ask, num_proc=self.process_count or 1, desc="Strategy Filtering Rows")
        return np.flatnonzero(answers["kept"][:])


def wrap_dataset_for_tokenized_prompt(
    prompt_tokenizer: PromptTokenizingStrategy,
    dataset: Dataset | IterableDataset,
    **kwargs,
) -> Dataset | IterableDataset:
    """The dataset, tokenized; a streamed one is tokenized as it is read.

    Args:
        prompt_tokenizer: the strategy that tokenizes the rows.
        dataset: the rows.
        kwargs: see `TokenizedPromptDataset`.
    """
    if not isinstance(dataset, IterableDataset):
        return TokenizedPromptDataset(prompt_tokenizer, dataset, **kwargs)
    if prompt_tokenizer.filter_rows:
        dataset = dataset.filter(prompt_tokenizer.filter_rows)
    features = dataset.features or next(iter(dataset.take(1)), {})
    return dataset.map(
        TokenizeRows(prompt_tokenizer, kwargs.get("name")),
        with_indices=True,
        remove_columns=list(features),
        **_batching(prompt_tokenizer),
    )


def _batching(strategy: PromptTokenizingStrategy) -> dict[str, Any]:
    return {"batched": True, "batch_size": BATCH_SIZE} if strategy.supports_batched else {}
