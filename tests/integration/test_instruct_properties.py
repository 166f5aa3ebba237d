"""What must hold for every row of the instruct types: the prompt begins the example and the answer with EOS is learnt."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl.prompt_strategies import load
from axolotl.utils.dict import DictDefault
from tests.tiny_tokenizers import KINDS, make_tokenizer_of_kind

TEXT = st.one_of(
    st.text(min_size=1, max_size=20),
    st.sampled_from(
        ["Hi", " two  spaces ", "</s>", "<s>a", "### Response:\n", "{instruction}", "{}", "é😀", "\n", "a" * 900]
    ),
)
OPTIONAL = st.one_of(st.none(), st.just(""), TEXT)
INSTRUCT = ("instruction", "input", "output")

# type -> fields of a row: what is asked, what may be left out, what is answered.
TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "alpaca": (("instruction",), ("input",), "output"),
    "alpaca:chat": (("instruction",), ("input",), "output"),
    "alpaca:chatml": (("instruction",), ("input",), "output"),
    "alpaca:phi": (("instruction",), ("input",), "output"),
    "alpaca_instruct": (("instruction",), ("input",), "output"),
    "alpaca_instruct.load_no_prompt": (("instruction",), ("input",), "output"),
    "alpaca_chat": (("instruction",), ("input",), "output"),
    "alpaca_chat.load_concise": (("instruction",), ("input",), "output"),
    "alpaca_chat.load_no_prompt": (("instruction",), ("input",), "output"),
    "alpaca_chat.load_qa": (("question",), (), "answer"),
    "alpaca_chat.load_camel_ai": (("message_1",), (), "message_2"),
    "alpaca_w_system": (("system", "instruction"), ("input",), "output"),
    "alpaca_w_system.load_instruct": (("system", "instruction"), ("input",), "output"),
    "alpaca_w_system.load_open_orca": (("system_prompt", "question"), (), "response"),
    "alpaca_w_system.load_open_orca_chatml": (("system_prompt", "question"), (), "response"),
    "orcamini": (("system_prompt", "question"), (), "response"),
    "gpteacher": (("instruction",), ("input",), "response"),
    "oasst": (("INSTRUCTION",), (), "RESPONSE"),
    "summarizetldr": (("article",), (), "summary"),
    "context_qa": (("article", "question"), (), "answer"),
    "creative_acr.load_answer": (("instruction",), (), "revision"),
    "metharme": (("prompt",), (), "generation"),
}
NUM_EOS = {"metharme": 3}


@st.composite
def rows_of(draw, type_: str) -> dict[str, str | None]:
    asked, optional, answer = TYPES[type_]
    row = {name: draw(TEXT) for name in (*asked, answer)}
    for name in optional:
        value = draw(OPTIONAL)
        if value is not None or draw(st.booleans()):
            row[name] = value
    return row


@pytest.mark.parametrize("type_", sorted(TYPES))
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_the_prompt_begins_the_example_and_the_answer_is_learnt(type_, data):
    tokenizer = make_tokenizer_of_kind(data.draw(st.sampled_from(sorted(KINDS))))
    row = data.draw(rows_of(type_))
    asked, _, answer = TYPES[type_]
    strategy = load(type_, tokenizer, DictDefault(sequence_len=8192))
    tokenized = strategy.tokenize_prompt(row)
    ids, labels = tokenized["input_ids"], tokenized["labels"]
    assert len(ids) == len(labels) == len(tokenized["attention_mask"])

    answer_ids = with_eos(tokenizer(row[answer])["input_ids"], tokenizer, NUM_EOS.get(type_, 1))
    learnt = [label for label in labels if label != -100]
    assert learnt == answer_ids[answer_ids[:1] == [tokenizer.bos_token_id] :]
    assert ids[len(ids) - len(learnt) :] == learnt

    prompt = next(iter(_prompt(strategy, row)))
    assert ids[: len(ids) - len(learnt)] == tokenizer(prompt)["input_ids"]
    assert all(row[name] in prompt for name in asked)

    assert strategy.supports_batched
    everything = load(type_, tokenizer, DictDefault(sequence_len=8192, train_on_inputs=True)).tokenize_prompt(row)
    assert everything["input_ids"] == everything["labels"] == ids
    batch = strategy.tokenize_prompt({name: [value, value] for name, value in row.items()})
    assert batch == {key: [values, values] for key, values in tokenized.items()}


def with_eos(ids: list[int], tokenizer, times: int = 1) -> list[int]:
    """Tokens of a text with EOS, where it has any and does not end with it."""
    return ids if not ids or ids[-1] == tokenizer.eos_token_id else ids + [tokenizer.eos_token_id] * times


def _prompt(strategy, row):
    fields = strategy.parse_instruction_fields(row)
    if len(fields) == 4:
        instruction, input_text, _, system = fields
        return strategy.prompter.build_prompt_w_system(system, instruction, input_text)
    return strategy.prompter.build_prompt(*fields[:2])


@given(
    segments=st.lists(
        st.fixed_dictionaries({"label": st.booleans(), "text": st.text(max_size=10)}), min_size=1, max_size=5
    ),
    kind=st.sampled_from(sorted(KINDS)),
)
@settings(max_examples=40, deadline=None)
def test_segments_are_learnt_as_they_say(segments, kind):
    tokenizer = make_tokenizer_of_kind(kind)
    row = load("input_output", tokenizer, DictDefault(sequence_len=8192)).tokenize_prompt({"segments": segments})
    ids = [tokenizer(segment["text"], add_special_tokens=False)["input_ids"] for segment in segments]
    assert row["input_ids"] == list(chain(*ids))
    learnt = [
        tokens if segment["label"] else [-100] * len(tokens) for tokens, segment in zip(ids, segments, strict=True)
    ]
    assert row["labels"] == list(chain(*learnt))


@given(texts=st.lists(TEXT, min_size=1, max_size=3), length=st.integers(3, 40), kind=st.sampled_from(sorted(KINDS)))
@settings(max_examples=40, deadline=None)
def test_pieces_of_a_completion_are_the_text(texts, length, kind):
    tokenizer = make_tokenizer_of_kind(kind)
    strategy = load("completion", tokenizer, DictDefault(sequence_len=length))
    pieces = strategy.tokenize_prompt({"text": texts})
    assert pieces["labels"] == pieces["input_ids"] and all(0 < len(piece) <= length for piece in pieces["input_ids"])
    whole: list[int] = []
    for text in texts:
        whole += with_eos(tokenizer(text)["input_ids"], tokenizer)[: 64 * length]
    assert list(chain(*pieces["input_ids"])) == whole
