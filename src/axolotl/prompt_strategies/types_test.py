"""What the smaller types write and learn."""

from __future__ import annotations

import pytest

from axolotl.exceptions import DatasetError
from axolotl.prompt_strategies import load
from axolotl.utils.dict import DictDefault

QA = {"question": "Q", "answer": "A"}
ORCA = {"system_prompt": "S", "question": "Q", "response": "R"}
SYSTEM = {"system": "S", "instruction": "I", "input": "", "output": "O"}
CREATIVE = {
    "instruction": "I",
    "answer": "first",
    "scores": {"depth": 3, "wit": None, "Ä": 4},
    "critiques": "Dull.",
    "revision": "second",
}
CHAT_PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately and concisely completes the request.\n\n"
)


def tokenized_text(tokenizer, type_, row, **ds_cfg):
    """The text of a row, with what is masked before and what is learnt after the bar."""
    row = load(type_, tokenizer, DictDefault(sequence_len=512), DictDefault(ds_cfg)).tokenize_prompt(row)
    learnt = [label != -100 for label in row["labels"]]
    start = learnt.index(True)
    assert all(learnt[start:])
    return tokenizer.decode(row["input_ids"][:start]) + "|" + tokenizer.decode(row["labels"][start:])


@pytest.mark.parametrize(
    ("type_", "row", "text"),
    [
        ("alpaca_instruct.load_no_prompt", SYSTEM, "### Instruction:\nI\n\n### Response:\n|O</s>"),
        ("alpaca_chat.load_no_prompt", SYSTEM, "USER: I\nASSISTANT:|O</s>"),
        ("alpaca_chat.load_qa", QA, f"SYSTEM: {CHAT_PREAMBLE}\nUSER: Q\nASSISTANT:|A</s>"),
        ("alpaca_w_system", SYSTEM, "SYSTEM: S\nUSER: I\nASSISTANT:|O</s>"),
        ("alpaca_w_system.load_instruct", SYSTEM, "### System:\nS\n\n### Instruction:\nI\n\n### Response:\n|O</s>"),
        ("alpaca_w_system.load_open_orca", ORCA, "### System:\nS\n### Human:\nQ\n### Assistant:\n|R</s>"),
        (
            "alpaca_w_system.load_open_orca_chatml",
            ORCA,
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n|R</s>",
        ),
        ("orcamini", ORCA, "### System:\nS\n\n### User:\nQ\n\n### Response:\n|R</s>"),
        (
            "summarizetldr",
            {"article": "A", "summary": "S"},
            "USER: Summarize the following article as a TL;DR.\nA\nASSISTANT:|S</s>",
        ),
        ("context_qa.load_v2", {**QA, "context": "C"}, "Context: C\nQuestion: Q\n|Answer: A</s>"),
        ("orcamini", {**ORCA, "system_prompt": None}, "### System:\n\n\n### User:\nQ\n\n### Response:\n|R</s>"),
        ("metharme", {"prompt": "P", "generation": "G"}, "P|G</s></s></s>"),
        ("metharme", {"prompt": "P", "generation": "G</s>"}, "P|G</s></s></s>"),
        (
            "creative_acr.load_answer",
            CREATIVE,
            "Answer the following question in a comprehensive, in-depth, and creative way. Additionally your response should be "
            "relevant, accurate, and free of any ambiguity.\nUSER: I\nASSISTANT:|second</s>",
        ),
        (
            "creative_acr.load_critique",
            CREATIVE,
            "USER: Given the following question and answer, evaluate the answer. First give scores, then a critique.\n\n"
            "Question: I\n\nAnswer: first\nASSISTANT:|depth: 3\nÄ: 4\nDull.</s>",
        ),
        (
            "creative_acr.load_revise",
            {**CREATIVE, "scores": "depth: 3\n", "critiques": ["Dull.", "Long."]},
            "USER: Given the following question, answer and evaluation of the answer, write a better answer.\n\n"
            "Question: I\n\nAnswer: first\n\nEvaluation:\ndepth: 3\nDull.\nLong.\nASSISTANT:|second</s>",
        ),
        (
            "input_output",
            {"segments": [{"label": False, "text": "Q: "}, {"label": True, "text": "A</s>"}]},
            "Q: |A</s>",
        ),
    ],
)
def test_text_of_a_type(tiny_tokenizer, type_, row, text):
    bos = "" if type_ == "input_output" else "<s>"
    assert tokenized_text(tiny_tokenizer, type_, row) == bos + text


@pytest.mark.parametrize(
    ("type_", "row", "answer"),
    [
        ("jeopardy", {"question": "Q", "category": "C", "answer": "A"}, "what is A</s>"),
        ("oasst", {"INSTRUCTION": "I", "RESPONSE": "R"}, "R</s>"),
        ("gpteacher", {"instruction": "I", "response": "R"}, "R</s>"),
        ("explainchoice", {"question": "Q", "choices": ["a", "b"], "solution": "a"}, "a</s>"),
        ("concisechoice", {"question": "Q", "choices": ["a", "b"], "explanation": "b"}, "b</s>"),
        (
            "reflection",
            {"instruction": "I", "output": "o", "reflection": "r", "corrected": "c"},
            "Final Response:\nc</s>",
        ),
        ("context_qa", {**QA, "article": "T"}, "A</s>"),
        ("context_qa.load_404", {"article": "T", "unanswerable_question": "Q"}, "based on the given context.</s>"),
        ("alpaca_chat.load_camel_ai", {"message_1": "1", "message_2": "2"}, "2</s>"),
        ("alpaca_chat.load_concise", SYSTEM, "O</s>"),
    ],
)
def test_answer_of_a_type(tiny_tokenizer, type_, row, answer):
    assert tokenized_text(tiny_tokenizer, type_, row).partition("|")[2].endswith(answer)


def test_metharme_fills_what_room_there_is_with_eos(tiny_tokenizer):
    room = len(tiny_tokenizer("G")["input_ids"]) + 2
    strategy = load("metharme", tiny_tokenizer, DictDefault(sequence_len=room))
    text = tiny_tokenizer.decode(strategy.tokenize_prompt({"prompt": "P", "generation": "G"})["input_ids"])
    assert text == "<s>PG</s></s>"


def test_creative_acr_needs_text(tiny_tokenizer):
    strategy = load("creative_acr.load_critique", tiny_tokenizer, DictDefault(sequence_len=512))
    with pytest.raises(DatasetError, match="`critiques` is null"):
        strategy.tokenize_prompt({**CREATIVE, "critiques": None})


def test_the_conversation_key_names_the_style(tiny_tokenizer):
    assert "<|im_start|>user\nI" in tokenized_text(tiny_tokenizer, "alpaca_chat", SYSTEM, conversation="chatml")


def test_user_defined_system_text(tiny_tokenizer):
    type_ = {"system_prompt": "default", "system_format": "[{system}] ", "no_input_format": "{instruction} -> "}
    row = {"instruction": "I", "output": "O"}
    assert tokenized_text(tiny_tokenizer, type_, row) == "<s>[default] I -> |O</s>"
    assert tokenized_text(tiny_tokenizer, type_, {**row, "system": "S"}) == "<s>[S] I -> |O</s>"


@pytest.mark.parametrize(
    ("type_", "row"),
    [
        ("reflection", {"instruction": "I", "output": "O", "reflection": "R", "corrected": "C " * 600}),
        ({"format": "{input}", "no_input_format": ""}, {"instruction": "", "output": "O " * 600}),
        ("metharme", {"prompt": "", "generation": "G " * 600}),
        ("pygmalion", {"conversations": [{"role": "bot", "value": "B " * 600}]}),
        ("llama2_chat", {"conversations": [{"from": "human", "value": "H"}, {"from": "gpt", "value": "B " * 600}]}),
    ],
)
def test_a_row_that_is_too_long_is_seen_to_be(tiny_tokenizer, type_, row):
    assert len(load(type_, tiny_tokenizer, DictDefault(sequence_len=512)).tokenize_prompt(row)["input_ids"]) > 512


def test_a_text_of_completion_is_cut_after_its_last_piece(tiny_tokenizer, caplog):
    strategy = load("completion", tiny_tokenizer, DictDefault(sequence_len=4), DictDefault(field="text"))
    pieces = strategy.tokenize_prompt({"text": "a " * 600})["input_ids"]
    assert [len(piece) for piece in pieces] == [4] * 64
    assert "longer than 256 tokens" in caplog.text


def test_completion_field(tiny_tokenizer):
    strategy = load("completion", tiny_tokenizer, DictDefault(sequence_len=512), DictDefault(field="body"))
    assert strategy.tokenize_prompt({"body": "Hello"})["input_ids"] == [tiny_tokenizer("Hello</s>")["input_ids"]]


def test_input_output_batches_equal_rows(tiny_tokenizer):
    strategy = load("input_output", tiny_tokenizer, DictDefault(sequence_len=512))
    rows = [[{"label": True, "text": "a"}, {"label": False, "text": ""}], [{"label": False, "text": "Hello"}]]
    batch = strategy.tokenize_prompt({"segments": rows})
    for index, row in enumerate(rows):
        assert {key: values[index] for key, values in batch.items()} == strategy.tokenize_prompt({"segments": row})
    with pytest.raises(DatasetError, match=r"`segments\[0\]\.text` is NoneType"):
        strategy.tokenize_prompt({"segments": [{"label": True, "text": None}]})
    with pytest.raises(DatasetError, match=r"`segments\[1\]\.label` is text, but it must be true or false"):
        strategy.tokenize_prompt({"segments": [{"label": True, "text": "a"}, {"label": "false", "text": "b"}]})
    for segments in ("text", ["text"]):
        with pytest.raises(DatasetError, match="`segments` must be a list of mappings"):
            strategy.tokenize_prompt({"segments": segments, "id": 1})


def test_pygmalion_learns_answers_without_their_prefix(tiny_tokenizer):
    strategy = load("pygmalion", tiny_tokenizer, DictDefault(sequence_len=512))
    messages = [("system", "P\n<START>"), ("human", "Hi"), ("bot", "Yo")]
    row = strategy.tokenize_prompt({"conversations": [{"role": role, "value": value} for role, value in messages]})
    assert tiny_tokenizer.decode(row["input_ids"]) == "<s><|system|>Persona: P<|user|> Hi<|model|> Yo</s>"
    assert tiny_tokenizer.decode([label for label in row["labels"] if label != -100]) == " Yo</s>"
    strategy = load("pygmalion", tiny_tokenizer, DictDefault(sequence_len=512, train_on_inputs=True))
    row = strategy.tokenize_prompt({"conversations": [{"role": role, "value": value} for role, value in messages]})
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize(("last_only", "expected"), [(False, [1, 0]), (True, [0])])
def test_steps_have_their_label_on_the_separator(tiny_tokenizer, last_only, expected):
    strategy = load(
        "stepwise_supervised",
        tiny_tokenizer,
        DictDefault(sequence_len=512),
        DictDefault(train_on_last_step_only=last_only),
    )
    row = strategy.tokenize_prompt({"prompt": "P", "completions": ["one", "two"], "labels": [True, False]})
    assert tiny_tokenizer.decode(row["input_ids"]) == "<s>Pone\ntwo\n"
    assert [label for label in row["labels"] if label != -100] == expected
    assert all(
        tiny_tokenizer.decode([token]) == "\n"
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
        if label != -100
    )
    with pytest.raises(DatasetError, match="2 `completions` but 1 `labels`"):
        strategy.tokenize_prompt({"prompt": "P", "completions": ["one", "two"], "labels": [True]})
    with pytest.raises(DatasetError, match=r"One of the `labels` is '\+'"):
        strategy.tokenize_prompt({"prompt": "P", "completions": ["one"], "labels": ["+"]})


def test_llama2_chat(tiny_tokenizer):
    strategy = load("llama2_chat", tiny_tokenizer, DictDefault(sequence_len=128))
    turns = [("system", "S"), ("human", "Hi "), ("gpt", "Yo"), ("human", "A"), ("gpt", "B")]
    row = strategy.tokenize_prompt({"conversations": [{"from": role, "value": value} for role, value in turns]})
    kept = sum(row["attention_mask"])
    assert len(row["input_ids"]) == 128 and set(row["input_ids"][kept:]) == {tiny_tokenizer.pad_token_id}
    assert tiny_tokenizer.decode(row["input_ids"][:kept]) == (
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nHi [/INST] Yo </s><s>[INST] A [/INST] B </s><s>"
    )
    assert tiny_tokenizer.decode([label for label in row["labels"] if label != -100]).replace(" ", "") == "Yo</s>B</s>"
    strategy = load("llama2_chat", tiny_tokenizer, DictDefault(sequence_len=16, train_on_inputs=True))
    whole = strategy.tokenize_prompt({"conversations": [{"from": role, "value": value} for role, value in turns]})
    assert whole["input_ids"] == whole["labels"] == row["input_ids"][:kept]
    with pytest.raises(DatasetError, match="must alternate"):
        strategy.tokenize_prompt({"conversations": [{"from": "gpt", "value": "Yo"}]})
