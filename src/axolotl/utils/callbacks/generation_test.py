"""Prompts cut from rows, and what is generated after them."""

from __future__ import annotations

import pytest
from transformers import TrainerState

from axolotl.utils.callbacks.generation import GenerationSettings, find_stops, generate_answers, split_row
from axolotl.utils.callbacks.sample_trackers import Sample, as_text
from tests.tiny import make_tiny_llama, make_tiny_tokenizer


@pytest.mark.parametrize(
    ("labels", "prompt", "answer"),
    [
        ([-100, -100, 3, 4, 5, 6], [1, 2], [3, 4, 5, 6]),
        ([-100, -100, 3, -100, 5, -100], [1, 2, 3, 4], [5]),  # the last answer, with the conversation before it
        ([1, 2, 3, 4, 5, 6], [1, 2, 3], [4, 5, 6]),
        ([-100, 2, 3, 4, 5, 6], [1, 2, 3], [4, 5, 6]),  # BOS alone is no prompt
        ([-100] * 6, [1, 2, 3], [4, 5, 6]),
    ],
)
def test_a_row_is_split_where_its_answer_begins(labels, prompt, answer):
    assert split_row([1, 2, 3, 4, 5, 6], labels, 0.5) == (prompt, answer)


@pytest.mark.parametrize(("ratio", "length"), [(0.0, 1), (0.2, 1), (0.75, 3), (1.0, 4)])
def test_a_prompt_has_a_token_at_least(ratio, length):
    prompt, answer = split_row([1, 2, 3, 4], [1, 2, 3, 4], ratio)
    assert (len(prompt), len(answer)) == (length, 4 - length)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_tokenizer(folder / "t"), make_tiny_llama(folder / "m")


def test_answers_do_not_depend_on_the_batch(tiny):
    tokenizer, model = tiny
    prompts = [tokenizer(text)["input_ids"] for text in ("a dog", "How many legs has a dog?", "def add(a, b):", "x")]
    settings = GenerationSettings("test", 4, 12)
    one, together = (
        generate_answers(model, tokenizer, prompts, settings, [1], batch_size=size) for size in (1, len(prompts))
    )
    assert one == together
    assert all(0 < len(answer) <= 12 for answer in one)


def test_an_answer_ends_before_a_token_that_ends_turns(tiny):
    tokenizer, model = tiny
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert find_stops(tokenizer, model, [[7, 8, end_of_turn], [9]]) == [1, end_of_turn]
    prompt = tokenizer("a dog")["input_ids"]
    settings = GenerationSettings("test", 1, 8)
    (answer,) = generate_answers(model, tokenizer, [prompt], settings, [1])
    (cut,) = generate_answers(model, tokenizer, [prompt], settings, [1, answer[3]])
    assert cut == answer[: answer.index(answer[3])]


def test_the_window_of_the_model_is_not_left(tiny):
    tokenizer, model = tiny
    window = model.config.max_position_embeddings
    prompts = [[5] * window, [5] * (window - 2)]
    full, short = generate_answers(model, tokenizer, prompts, GenerationSettings("test", 2, 8), [1])
    assert full == []
    assert len(short) <= 2


def test_samples_as_text_and_line():
    sample = Sample("two\nlines", "*no* markup", "")
    assert "    two\n    lines" in as_text([sample])
    assert "    *no* markup" in as_text([sample])
    assert sample.as_dict(TrainerState(global_step=3, epoch=0.5))["step"] == 3
