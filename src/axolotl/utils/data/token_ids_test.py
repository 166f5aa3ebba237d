"""Tokens that the model has no row for are an error before training, wherever rows come from."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from axolotl.common.datasets import TrainDatasetMeta, check_given_rows
from axolotl.exceptions import DatasetError
from axolotl.utils.data.sft import prepare
from axolotl.utils.data.token_ids import LargestToken, check_row_tokens, find_largest_token, read_embedding
from axolotl.utils.dict import DictDefault
from axolotl.utils.tokenization import embedding_rows
from tests.tiny import make_tiny_tokenizer

NUM_TOKENS = 290


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=NUM_TOKENS)
    assert len(tokenizer) == NUM_TOKENS
    return tokenizer


def rows_with(number: int, **row: list[int]) -> list[dict[str, list[int]]]:
    """Rows of tokens; the one of this number has other values."""
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]} for _ in range(6)]
    rows[number].update(row)
    return rows


@pytest.fixture
def config(tmp_path):
    def make(rows, **keys):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DictDefault(
            {
                "base_model": "a-model",
                "model_vocab_size": 300,
                "datasets": [{"path": str(path)}],
                "dataset_prepared_path": str(tmp_path / "prepared"),
                "sequence_len": 64,
                "micro_batch_size": 2,
                "gradient_accumulation_steps": 1,
                "num_epochs": 1,
                "seed": 42,
                **keys,
            }
        )

    return make


BEYOND = [
    ({"input_ids": [5, 300, 7]}, "row 4: `input_ids` has the token 300"),
    ({"labels": [-100, 6, 50_000]}, "row 4: `labels` has the token 50000"),
]
NEGATIVE = [
    ({"input_ids": [5, -100, 7]}, "row 4: `input_ids` has a negative number"),
    ({"labels": [-100, -1, 7]}, "row 4: `labels` has a negative number"),
    ({"labels": [-100, -101, 7]}, "row 4: `labels` has a negative number"),
]


@pytest.mark.parametrize("row, said", [*BEYOND, *NEGATIVE])
@pytest.mark.parametrize("keys", [{}, {"streaming": True, "max_steps": 3}], ids=["prepared", "streamed"])
def test_a_number_that_is_no_token_of_the_model_is_named(config, tokenizer, row, said, keys):
    cfg = config(rows_with(4, **row), **keys)
    with pytest.raises(DatasetError) as error_info:
        train = prepare(cfg, tokenizer).train
        list(itertools.islice(train, 4))
    message = str(error_info.value)
    assert f"dataset `path: {cfg.datasets[0]['path']}`, {said}" in message
    if "negative" not in said:
        assert "the embedding of `base_model: a-model` has 300 rows, for the tokens 0 to 299" in message
        assert "`tokenizer_config`" in message


@pytest.mark.parametrize("keys", [{}, {"streaming": True, "max_steps": 3}], ids=["prepared", "streamed"])
def test_tokens_that_the_embedding_has_a_row_for_pass(config, tokenizer, keys):
    train = prepare(config(rows_with(4, input_ids=[5, 299, 7], labels=[-100, 299, 7]), **keys), tokenizer).train
    assert list(itertools.islice(train, 3))


def test_rows_that_were_prepared_for_a_larger_model_do_not_pass(config, tokenizer):
    rows = rows_with(4, input_ids=[5, 350, 7])
    assert len(prepare(config(rows, model_vocab_size=400), tokenizer).train) == 6
    with pytest.raises(DatasetError, match=r"row 4: `input_ids` has the token 350.* has 300 rows"):
        prepare(config(rows), tokenizer)
    assert len(prepare(config(rows, model_vocab_size=None), tokenizer).train) == 6


def test_rows_to_evaluate_on_are_looked_at_too(config, tokenizer, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"input_ids": [5, 300], "labels": [5, 300]}))
    cfg = config(rows_with(0), test_datasets=[{"path": str(tmp_path / "test.jsonl")}])
    with pytest.raises(DatasetError, match=r"test.jsonl`, row 0: `input_ids` has the token 300"):
        prepare(cfg, tokenizer)


@pytest.mark.parametrize(
    "keys, num_rows, said",
    [
        ({}, 300, ["rounds it up to 320 rows"]),
        ({"resize_token_embeddings_to_32x": True}, 320, []),
        ({"model_vocab_size": 100}, NUM_TOKENS, ["rounds it up to 320 rows"]),
        ({"shrink_embeddings": True}, NUM_TOKENS, ["without `shrink_embeddings` it keeps its 300 rows", "320 rows"]),
        ({"model_vocab_size": 512}, 512, []),
    ],
)
def test_the_size_of_the_embedding_and_what_makes_it_larger(config, tokenizer, keys, num_rows, said):
    embedding = read_embedding(config([], **keys), tokenizer)
    assert embedding is not None
    assert embedding.num_rows == num_rows
    for part in said:
        assert part in embedding.remedy
    assert ("resize_token_embeddings_to_32x" in embedding.remedy) is any("320" in part for part in said)


def test_an_embedding_that_is_not_the_limit(config, tokenizer):
    assert read_embedding(config([], model_vocab_size=None), tokenizer) is None
    assert read_embedding(config([], is_multimodal=True), tokenizer) is None


def test_the_largest_token_among_chosen_rows():
    first = Dataset.from_dict({"input_ids": [[], [9, 1], []], "labels": [[], [9, -100], []]})
    second = Dataset.from_dict({"input_ids": [[70, 2], [3], []], "labels": [[-100, 2], [80], []]})
    rows = concatenate_datasets([first, second])
    assert find_largest_token(rows, "d") == LargestToken(80, "row 4", "labels")
    assert find_largest_token(rows.select([3, 1, 2]), "d") == LargestToken(70, "row 0", "input_ids")
    assert find_largest_token(rows.select([0, 2]), "d").token <= 0
    with pytest.raises(DatasetError, match="row 1: `labels` has a negative number"):
        find_largest_token(Dataset.from_dict({"labels": [[], [-1]]}), "d")


def test_rows_without_labels_are_looked_at():
    check_row_tokens([{"input_ids": np.array([], dtype=np.int32)}, {"input_ids": np.array([1])}], "d", None)
    with pytest.raises(DatasetError, match="row 1: `input_ids`"):
        check_row_tokens([{"input_ids": np.array([1])}, {"input_ids": np.array([-1])}], "d", None)


def test_an_embedding_grows_to_its_tokens_and_shrinks_when_asked():
    assert embedding_rows(10, 33) == 33
    assert embedding_rows(10, 33, to_32x=True) == 64
    assert embedding_rows(100, 33, to_32x=True) == 100
    assert embedding_rows(100, 33, to_32x=True, shrinks=True) == 64


def test_rows_that_a_plugin_gives_are_looked_at(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    cfg = DictDefault(base_model="a-model", tokenizer_config=str(tmp_path), model_vocab_size=300)
    good, bad = Dataset.from_list(rows_with(0)), Dataset.from_list(rows_with(4, input_ids=[5, 300, 7]))
    texts = Dataset.from_dict({"input_ids": [["a"]], "labels": [1.5]})
    check_given_rows(cfg=cfg, dataset_meta=TrainDatasetMeta(good, texts))
    with pytest.raises(DatasetError, match=r"`eval_dataset` of a plugin, row 4: `input_ids` has the token 300"):
        check_given_rows(cfg=cfg, dataset_meta=TrainDatasetMeta(good, bad))
