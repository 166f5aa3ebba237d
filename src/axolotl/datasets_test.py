"""Tokenizing whole datasets, and what is said about rows that cannot be tokenized."""

from __future__ import annotations

import pytest
from datasets import Dataset

from axolotl.datasets import TokenizedPromptDataset, wrap_dataset_for_tokenized_prompt
from axolotl.exceptions import DatasetError
from axolotl.prompt_strategies import load
from axolotl.utils.dict import DictDefault

CFG = DictDefault(sequence_len=64, train_on_inputs=False)
ROWS = [{"instruction": f"Say {i}", "output": f"It is {i}."} for i in range(5)]


@pytest.mark.parametrize("process_count", [None, 1, 2])
def test_each_row_is_tokenized(tiny_tokenizer, process_count):
    strategy = load("alpaca", tiny_tokenizer, CFG)
    dataset = TokenizedPromptDataset(strategy, Dataset.from_list(ROWS), process_count=process_count)
    assert isinstance(dataset, Dataset)
    assert sorted(dataset.column_names) == ["attention_mask", "input_ids", "labels"]
    assert [dict(row) for row in dataset] == [strategy.tokenize_prompt(row) for row in ROWS]


def test_a_stream_is_tokenized_as_it_is_read(tiny_tokenizer):
    strategy = load("alpaca", tiny_tokenizer, CFG)
    stream = wrap_dataset_for_tokenized_prompt(strategy, Dataset.from_list(ROWS).to_iterable_dataset())
    assert [dict(row) for row in stream] == [strategy.tokenize_prompt(row) for row in ROWS]


def test_completion_makes_more_rows(tiny_tokenizer):
    strategy = load("completion", tiny_tokenizer, DictDefault(sequence_len=8))
    dataset = TokenizedPromptDataset(strategy, Dataset.from_dict({"text": ["the lazy dog. " * 8, "Hello"]}))
    assert len(dataset) > 2 and all(len(row["input_ids"]) <= 8 for row in dataset)
    whole = tiny_tokenizer("the lazy dog. " * 8)["input_ids"] + [tiny_tokenizer.eos_token_id]
    assert [token for row in list(dataset)[:-1] for token in row["input_ids"]] == whole


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([*ROWS, {"instruction": None, "output": "O"}], r"Row 5 of `data\.jsonl`: `instruction` is null"),
        ([{"question": "I", "output": "x"}], r"Row 0 of `data\.jsonl` has no field `instruction`.*`question`"),
    ],
)
def test_a_bad_row_is_named(tiny_tokenizer, rows, says):
    with pytest.raises(DatasetError, match=says):
        TokenizedPromptDataset(load("alpaca", tiny_tokenizer, CFG), Dataset.from_list(rows), name="data.jsonl")


def test_rows_are_filtered_when_the_strategy_says_so(tiny_tokenizer):
    strategy = load("alpaca", tiny_tokenizer, CFG)
    strategy.filter_rows = lambda row: row["instruction"] != "Say 1"
    assert len(TokenizedPromptDataset(strategy, Dataset.from_list(ROWS))) == 4
