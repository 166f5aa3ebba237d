"""Rows and entries that nobody would write: each is trained on, dropped with a reason, or refused by name. None is lost."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axolotl.exceptions import AxolotlError, ConfigError, DatasetError
from axolotl.utils.config import validate_config
from axolotl.utils.data.sft import build_rows
from axolotl.utils.data.streaming import prepare_streaming_dataset
from axolotl.utils.dict import DictDefault
from tests.tiny import CHATML, make_tiny_tokenizer

TALK = [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": "Two."}]
QA = {"instruction": "Add.", "input": "1 1", "output": "2"}

# Type -> a row as it should be, and further keys of the entry.
TYPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpaca": (QA, {}),
    "alpaca:chatml": (QA, {}),
    "alpaca_chat.load_qa": ({"question": "a", "answer": "b"}, {}),
    "alpaca_w_system": ({"system": "s", **QA}, {}),
    "alpaca_w_system.load_open_orca": ({"system_prompt": "s", "question": "q", "response": "r"}, {}),
    "gpteacher": ({"instruction": "a", "input": "b", "response": "c"}, {}),
    "explainchoice": ({"question": "a", "choices": ["b", "c"], "solution": "b", "explanation": "d"}, {}),
    "summarizetldr": ({"article": "a", "summary": "b"}, {}),
    "jeopardy": ({"question": "a", "category": "b", "answer": "c"}, {}),
    "reflection": ({**QA, "reflection": "r", "corrected": "c"}, {}),
    "context_qa": ({"article": "a", "question": "b", "answer": "c"}, {}),
    "metharme": ({"prompt": "<|user|>a", "generation": "b"}, {}),
    "pygmalion": ({"conversations": [{"role": "human", "value": "a"}, {"role": "bot", "value": "b"}]}, {}),
    "llama2_chat": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {}),
    "input_output": ({"segments": [{"label": False, "text": "a"}, {"label": True, "text": "b c d"}]}, {}),
    "completion": ({"text": "some words"}, {}),
    "pretrain": ({"text": "some words"}, {}),
    "stepwise_supervised": ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, {}),
    "chat_template": ({"messages": TALK, "tools": None}, {}),
    "chat_template trained": (
        {"messages": [{**turn, "train": True, "detail": None} for turn in TALK]},
        {"type": "chat_template", "message_field_training": "train", "message_field_training_detail": "detail"},
    ),
    "messages.chat": ({"messages": TALK}, {"chat_template": "chatml"}),
    "user": (
        {"q": "a", "i": "b", "a": "c"},
        {"type": {"field_instruction": "q", "field_input": "i", "field_output": "a"}},
    ),
    "tokens": ({"input_ids": [5, 6, 7], "labels": [5, 6, 7], "attention_mask": [1, 1, 1]}, {"type": None}),
}
SPLITTING = ("completion", "pretrain")

words = st.text(max_size=8) | st.sampled_from(
    ["user", "assistant", "system", "tool", "role", "content", "{{ x }}", "</s>"]
)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | words
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a row, down to the letters."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, inner in items for place in places(inner, (*path, key))]


@st.composite
def spoiled(draw: st.DrawFn, row: dict[str, Any]) -> dict[str, Any]:
    """A good row with something else in one or two of its places, or without them."""
    row = copy.deepcopy(row)
    for _ in range(draw(st.integers(0, 2))):
        if not places(row):
            break
        *path, last = draw(st.sampled_from(places(row)))
        inside = row
        for key in path:
            inside = inside[key]
        if draw(st.booleans()):
            inside[last] = draw(anything)
        else:
            del inside[last]
    if draw(st.booleans()):
        row[draw(words)] = draw(anything)
    if draw(st.integers(0, 30)) == 30:
        row["half"] = "\ud800"
    return row


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=CHATML)


def config(path: Path, type_: str, **keys: Any) -> DictDefault:
    entry = {"path": str(path), "type": type_, **TYPES[type_][1]}
    cfg = {"datasets": [entry], "sequence_len": 900, "micro_batch_size": 1, "seed": 3, "dataset_num_proc": 1}
    return DictDefault({**cfg, **keys})


def check_refusal(error: AxolotlError, path: Path) -> None:
    message = str(error)
    assert isinstance(error, (DatasetError, ConfigError)), type(error)
    assert path.name in message, message
    assert "row" in message.lower() or "line" in message, message
    assert len(message) < 3000


@pytest.mark.parametrize("type_", TYPES)
@given(data=st.data())
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_rows(type_, tokenizer, data):
    good, _ = TYPES[type_]
    rows = data.draw(st.lists(spoiled(good), min_size=1, max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = config(path, type_)
        try:
            made, report = build_rows(cfg, cfg.datasets, tokenizer, None, "train", folder)
        except AxolotlError as error:
            check_refusal(error, path)
            return
        (entry,) = report["datasets"]
        assert entry["rows_read"] == len(rows)
        assert entry["rows_made"] - sum(entry["dropped"].values()) == entry["rows_kept"] == len(made)
        if type_ not in SPLITTING:
            assert entry["rows_made"] == len(rows)
        for row in made:
            assert 2 <= len(row["input_ids"]) <= 900
            assert len(row["labels"]) == len(row["input_ids"]) == row["length"]
            assert all(
                label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True)
            ) or type_ in (
                "stepwise_supervised",
                "tokens",
            )


@pytest.mark.parametrize("type_", ["alpaca", "chat_template", "completion", "tokens"])
@given(data=st.data())
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_streamed_rows(type_, tokenizer, data):
    good, _ = TYPES[type_]
    rows = data.draw(st.lists(spoiled(good), min_size=1, max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = config(path, type_, streaming=True, max_steps=1, shuffle_merged_datasets=False)
        given_out = 0
        try:
            for batch, position in prepare_streaming_dataset(cfg, tokenizer).read():
                if position["mix"]["sources"][0]["pass"]:
                    break
                given_out += len(batch)
                dropped = sum(sum(reasons.values()) for reasons in position["dropped_now"].values())
        except AxolotlError as error:
            check_refusal(error, path)
            return
        if type_ not in SPLITTING:
            assert given_out + dropped == len(rows)


roles = st.sampled_from(["user", "assistant", "system", "tool", "human"])
columns = st.sampled_from(["messages", "text", "output", "none"])
FIELDS: dict[str, st.SearchStrategy] = {
    "name": words,
    "split": st.sampled_from(
        ["train", "train[:50%]", "train[1:]", "train[5:]", "train[1:2]+train[:1]", "all", "test", "["]
    ),
    "data_files": st.sampled_from(["fuzzed.jsonl", "*.jsonl", ["fuzzed.jsonl"], {"train": "fuzzed.jsonl"}, "none.csv"]),
    "ds_type": st.sampled_from(["json", "JSON", "text", "csv", "parquet", "arrow", "none"]),
    "shards": st.integers(0, 4),
    "shards_idx": st.integers(-1, 4),
    "preprocess_shards": st.integers(0, 4),
    "weight": st.floats(-0.5, 3),
    "type": st.sampled_from(
        ["alpaca", "alpaca:chat", "chat_template", "completion", "pretrain", "input_output", "a.b"]
    ),
    "field": columns,
    "field_messages": columns,
    "message_property_mappings": st.dictionaries(st.sampled_from(["role", "content", "x"]), roles | words, max_size=3),
    "roles": st.dictionaries(roles, roles | st.lists(roles, max_size=2), max_size=3),
    "roles_to_train": st.lists(roles, max_size=2),
    "train_on_eos": st.sampled_from(["all", "turn", "last", "none"]),
    "chat_template": st.sampled_from(
        ["chatml", "llama3", "tokenizer_default", "tokenizer_default_fallback_chatml", "jinja"]
    ),
    "chat_template_jinja": st.sampled_from([CHATML, "{{ messages[0].content }}", "{% for", "", "{{ messages.x.y }}"]),
    "field_system": columns,
    "field_tools": columns,
    "drop_system_message": st.booleans(),
    "message_field_training": words,
    "split_thinking": st.booleans(),
    "revision": words,
}
odd = anything | st.dictionaries(st.sampled_from(["field_output", "format"]), words, max_size=3)


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    """An entry of `datasets` with fields that make sense, mostly."""
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True))
    return {name: draw(FIELDS[name] if draw(st.integers(0, 9)) else odd) for name in names}


@given(entry=entries(), in_folder=st.booleans())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_entries(tokenizer, entry, in_folder):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed.jsonl"
        path.write_text("".join(json.dumps({**QA, "messages": TALK, "text": "words"}) + "\n" for _ in range(3)))
        entry = {"path": folder if in_folder else str(path), "type": "chat_template", **entry}
        raw = {"base_model": folder, "datasets": [entry], "sequence_len": 900, "micro_batch_size": 1, "num_epochs": 1}
        raw |= {"gradient_accumulation_steps": 1, "learning_rate": 1e-3, "dataset_num_proc": 1}
        try:
            cfg = validate_config(DictDefault(raw))
        except ConfigError as error:
            assert "datasets" in str(error) or str(entry["path"]) in str(error) or "chat_template" in str(error)
            return
        try:
            _, report = build_rows(cfg, cfg.datasets, tokenizer, None, "train", folder)
        except AxolotlError as error:
            assert isinstance(error, (DatasetError, ConfigError))
            return
        for made in report["datasets"]:
            assert made["rows_made"] - sum(made["dropped"].values()) == made["rows_kept"]
