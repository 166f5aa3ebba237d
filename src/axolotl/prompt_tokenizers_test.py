"""Instruction strategies: what is learnt, and that rows and batches agree."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from axolotl.conftest import make_tokenizer
from axolotl.exceptions import DatasetError
from axolotl.prompt_tokenizers import (
    AlpacaPromptTokenizingStrategy,
    InstructionPromptTokenizingStrategy,
    encode_texts,
    parse_tokenized_to_result,
    tokenize_prompt_default,
)
from axolotl.prompters import AlpacaPrompter
from tests.tiny import make_tiny_tokenizer

TOKENIZER = make_tokenizer()
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40)


def alpaca(tokenizer=TOKENIZER, train_on_inputs=False, sequence_len=2048, style=None):
    return AlpacaPromptTokenizingStrategy(AlpacaPrompter(style), tokenizer, train_on_inputs, sequence_len)


@given(instruction=TEXT, given_input=TEXT, output=TEXT.filter(bool))
@settings(max_examples=60, deadline=None)
def test_the_prompt_is_a_masked_prefix_and_the_answer_is_learnt(instruction, given_input, output):
    row = {"instruction": instruction, "input": given_input, "output": output}
    tokenized = alpaca().tokenize_prompt(row)
    start = TOKENIZER(next(AlpacaPrompter().build_prompt(instruction, given_input)))["input_ids"]
    assert tokenized["input_ids"][: len(start)] == start
    assert tokenized["labels"][: len(start)] == [-100] * len(start)
    learnt = tokenized["labels"][len(start) :]
    assert learnt == tokenized["input_ids"][len(start) :]
    assert learnt[-1] == TOKENIZER.eos_token_id and TOKENIZER.bos_token_id not in learnt
    assert TOKENIZER.decode(learnt[:-1]) == output
    assert tokenized["attention_mask"] == [1] * len(learnt + start)


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5), st.booleans(), st.integers(3, 60))
@settings(max_examples=40, deadline=None)
def test_a_batch_equals_its_rows(rows, train_on_inputs, sequence_len):
    strategy = alpaca(train_on_inputs=train_on_inputs, sequence_len=sequence_len)
    assert strategy.supports_batched
    columns = {name: [row[i] for row in rows] for i, name in enumerate(("instruction", "input", "output"))}
    batch = strategy.tokenize_prompt(columns)
    for index in range(len(rows)):
        single = strategy.tokenize_prompt({name: values[index] for name, values in columns.items()})
        assert {key: values[index] for key, values in batch.items()} == single


def test_train_on_inputs_learns_everything():
    tokenized = alpaca(train_on_inputs=True).tokenize_prompt({"instruction": "I", "output": "o"})
    assert tokenized["labels"] == tokenized["input_ids"]


def test_eos_only_where_it_is_missing_and_there_is_room():
    strategy = alpaca(sequence_len=4)
    eos = TOKENIZER.eos_token_id
    assert strategy._tokenize("Hello</s>")["input_ids"].count(eos) == 1
    assert strategy._tokenize("Hello")["input_ids"][-1] == eos
    full = strategy._tokenize("Hello, how are you? I am fine.")["input_ids"]
    assert len(full) > 4 and eos not in full
    assert strategy._tokenize("Hello", add_eos_token=False)["input_ids"][-1] != eos
    assert strategy._tokenize("Hello", strip_bos_token=True)["input_ids"][0] != TOKENIZER.bos_token_id


def test_empty_text_gives_empty_lists():
    assert dict(alpaca()._tokenize("")) == {"input_ids": [], "attention_mask": [], "labels": []}


def test_a_tokenizer_without_bos():
    tokenizer = make_tokenizer(add_bos=False)
    tokenized = alpaca(tokenizer).tokenize_prompt({"instruction": "I", "output": "Hello"})
    assert tokenizer.bos_token_id not in tokenized["input_ids"]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_null_answer_is_an_empty_one(rows):
    def tokenize(value):
        return alpaca().tokenize_prompt({"instruction": ["I"] * rows, "input": [None] * rows, "output": [value] * rows})

    assert tokenize(None) == tokenize("")
    assert set(tokenize(None)["labels"][0]) == {-100}


@pytest.mark.parametrize("value", [3, ["a"]])
def test_an_answer_that_is_no_text_is_refused_by_name(value):
    with pytest.raises(DatasetError, match=r"`output` is .* must be text"):
        alpaca().tokenize_prompt({"instruction": "I", "input": "", "output": value})


def test_users_subclasses():
    class Mine(InstructionPromptTokenizingStrategy):
        def parse_instruction_fields(self, prompt):
            return prompt["q"], "", prompt["a"]

    class RowByRow(Mine):
        def tokenize_prompt(self, prompt):
            return {"input_ids": [1], "attention_mask": [1], "labels": [1]}

    mine = Mine(AlpacaPrompter(), TOKENIZER)
    expected = alpaca().tokenize_prompt({"instruction": "Q", "output": "A"})
    assert mine.tokenize_prompt({"q": "Q", "a": "A"}) == expected
    assert mine.supports_batched and not RowByRow(AlpacaPrompter(), TOKENIZER).supports_batched


def test_results_are_put_together():
    result, length = tokenize_prompt_default()
    result, length = parse_tokenized_to_result(result, length, {"input_ids": [5, 0]}, [-100, 7], pad_token_id=0)
    assert (result, length) == ({"input_ids": [5, 0], "attention_mask": [1, 0], "labels": [-100, 7]}, 2)


class SpellsOut(PreTrainedTokenizerFast):
    """A tokenizer that changes texts before its backend sees them."""

    def _encode_plus(self, text, *args, **kwargs):
        return super()._encode_plus([each.replace("&", "and") for each in text], *args, **kwargs)


@pytest.mark.parametrize("split_special_tokens", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, SpellsOut])
def test_ids_without_offsets_are_those_of_the_tokenizer(kind, side, split_special_tokens, tmp_path):
    make_tiny_tokenizer(tmp_path)
    tokenizer = kind.from_pretrained(tmp_path, truncation_side=side, split_special_tokens=split_special_tokens)
    texts = ["a & b", " ", "</s><|im_start|>x", "héllo 你好 🎉", "a" * 300, "\r\n\t"]
    tokenizer(texts, padding="max_length", max_length=400)  # leaves its padding with the backend
    found = encode_texts(tokenizer, texts, max_length=50)
    assert found == tokenizer(texts, truncation=True, max_length=50, padding=False)["input_ids"]
    assert (found[0] == encode_texts(tokenizer, ["a and b"], max_length=50)[0]) == (kind is SpellsOut)
