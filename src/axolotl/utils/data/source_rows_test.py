"""Errors name the row as it stands in the source, whatever `split` and `shards` take of it."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset

from axolotl.datasets import TokenizedPromptDataset
from axolotl.exceptions import DatasetError
from axolotl.prompt_strategies import load
from axolotl.utils.data.sft import build_entry
from axolotl.utils.data.shared import datasets_with_name_generator
from axolotl.utils.dict import DictDefault

NUM_ROWS = 60
BAD = 42


def build(tmp_path, tokenizer, rows, cfg=None, part="train", **keys):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DictDefault(sequence_len=64, seed=7, **(cfg or {}))
    for entry in datasets_with_name_generator([DictDefault(path=str(path), **keys)]):
        build_entry(config, entry, tokenizer, None, part, str(tmp_path))


ALPACA = [{"instruction": None if n == BAD else f"q{n}", "output": f"a{n}"} for n in range(NUM_ROWS)]
TOKENS = [{"input_ids": [1, 2], "labels": None if n == BAD else [1, 2]} for n in range(NUM_ROWS)]
KEYS = [
    ({}, f"row {BAD}"),
    ({"split": "train[:50]"}, f"row {BAD}"),
    ({"split": "train[:80%]"}, f"row {BAD}"),
    ({"split": "train[40:50]"}, f"row {BAD}"),
    ({"split": "train[50%:]"}, f"row {BAD - NUM_ROWS // 2} of split train[50%:]"),
    ({"split": "train[-20:]"}, f"row {BAD - NUM_ROWS + 20} of split train[-20:]"),
    ({"split": "train[:2]+train[40:50]"}, "row 4 of split train[:2]+train[40:50]"),
    ({"preprocess_shards": 4}, f"row {BAD}"),
    ({"split": "train[30:60]", "preprocess_shards": 4}, f"row {BAD}"),
]


@pytest.mark.parametrize(("keys", "row"), KEYS)
def test_the_row_of_an_error(tmp_path, tiny_tokenizer, keys, row):
    with pytest.raises(DatasetError) as refusal:
        build(tmp_path, tiny_tokenizer, ALPACA, type="alpaca", **keys)
    path = tmp_path / "rows.jsonl"
    assert f"{row.capitalize()} of `{path}`: `instruction` is null" in str(refusal.value)
    with pytest.raises(DatasetError) as refusal:
        build(tmp_path, tiny_tokenizer, TOKENS, **keys)
    assert f", {row}: field `labels` is missing" in str(refusal.value)


@pytest.mark.parametrize(("rows", "keys"), [(ALPACA, {"type": "alpaca"}), (TOKENS, {})])
def test_the_row_of_an_error_in_a_shard(tmp_path, tiny_tokenizer, rows, keys):
    refused = []
    for index in range(3):
        try:
            build(tmp_path, tiny_tokenizer, rows, shards=3, shards_idx=index, **keys)
        except DatasetError as error:
            refused.append(str(error))
    assert len(refused) == 1
    assert f"ow {BAD}" in refused[0]


def test_the_row_that_is_too_long(tmp_path, tiny_tokenizer):
    rows = [
        {"input_ids": [1] * (100 if n == BAD else 4), "labels": [1] * (100 if n == BAD else 4)} for n in range(NUM_ROWS)
    ]
    with pytest.raises(DatasetError, match=f"the first is row {BAD} with 100 tokens"):
        build(tmp_path, tiny_tokenizer, rows, {"excess_length_strategy": "raise"}, split="train[30:]")
    cfg = {"excess_length_strategy": "raise", "eval_sequence_len": 20}
    with pytest.raises(DatasetError, match="the first is row 0 of those made of it with 64 tokens"):
        build(tmp_path, tiny_tokenizer, [{"text": "word " * 100}], cfg, part="test", type="completion")


def test_the_row_of_an_error_after_a_filter(tiny_tokenizer):
    strategy = load("alpaca", tiny_tokenizer, DictDefault(sequence_len=64))
    strategy.filter_rows = lambda row: row["instruction"] not in {"q3", "q50"}
    rows = Dataset.from_list(ALPACA)
    with pytest.raises(DatasetError, match=rf"Row {BAD} of `d`"):
        TokenizedPromptDataset(strategy, rows, name="d")
    backwards = rows.select(range(NUM_ROWS - 1, -1, -1))
    with pytest.raises(DatasetError, match=rf"Row {NUM_ROWS - 1 - BAD} of `d`"):
        TokenizedPromptDataset(strategy, backwards, name="d")


def test_the_row_of_a_warning(tmp_path, tiny_tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("axolotl"), "propagate", True)
    chats = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "" if n == BAD else "a"}]}
        for n in range(NUM_ROWS)
    ]
    build(tmp_path, tiny_tokenizer, chats, {"chat_template": "chatml"}, type="chat_template", split="train[40:]")
    assert f"Row {BAD} of `{tmp_path / 'rows.jsonl'}`, turn 1 (assistant) should be learnt" in caplog.text
