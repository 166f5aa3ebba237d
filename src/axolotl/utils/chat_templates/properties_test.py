"""Properties of messages that the config names and that no message has."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, Features, Value

from axolotl.datasets import TokenizedPromptDataset
from axolotl.exceptions import DatasetError
from axolotl.prompt_strategies import load
from axolotl.utils.chat_templates.properties import NamedProperties
from axolotl.utils.data.json_lines import ExactJson
from axolotl.utils.data.sft import prepare
from axolotl.utils.dict import DictDefault
from tests.tiny import CHATML, make_tiny_tokenizer

ROWS = [
    {"messages": [{"role": "user", "content": 'the "thoughts": "x"'}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "why": "so", "näh": 1}]},
    {"messages": [{"role": "user", "content": "thoughts", "void": None}]},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=CHATML)


def as_json(rows, **options):
    return [{**row, "messages": json.dumps(row["messages"], **options)} for row in rows]


KEPT = {
    "struct": lambda: Dataset.from_list(ROWS),
    "text": lambda: Dataset.from_list(as_json(ROWS)),
    "text as it is": lambda: Dataset.from_list(as_json(ROWS, ensure_ascii=False)),
    "large text": lambda: Dataset.from_list(as_json(ROWS), features=Features({"messages": Value("large_string")})),
    "json": lambda: Dataset.from_list(ROWS, features=Features({"messages": ExactJson()})),
    "shuffled": lambda: Dataset.from_list(ROWS).select([2, 0, 1]),
}


@pytest.mark.parametrize("kept", KEPT)
def test_a_property_that_some_messages_have_is_found(kept):
    NamedProperties({"content": "content", "reasoning_content": "why", "other": "näh"}).check(KEPT[kept]())


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", ["thoughts", "hy", "void", "."])
def test_a_property_that_no_message_has_is_named(kept, name):
    with pytest.raises(DatasetError) as error_info:
        NamedProperties({"role": "role", "reasoning_content": name}).check(KEPT[kept]())
    said = str(error_info.value)
    assert f"`message_property_mappings: {{reasoning_content: {name}}}`: no message has the property `{name}`" in said
    assert "Those in `messages` have `role`, `content`, `why`" in said
    assert "the columns are `messages`" in said
    assert ("Did you mean `why`?" in said) is (name == "hy")


def test_nothing_is_said_of_what_is_somebody_elses_to_explain():
    named = NamedProperties({"role": "from"}, field_messages="turns")
    named.check(Dataset.from_list(ROWS))
    named.check(Dataset.from_dict({"turns": []}))
    named.check(Dataset.from_dict({"turns": [1, 2]}))


def test_keys_that_only_add_something_are_warned_of(caplog):
    named = NamedProperties(others={"message_field_training": "train", "field_thinking": "why"})
    named.check(Dataset.from_list(ROWS))
    assert "`message_field_training: train` has no effect: no message has the property `train`" in caplog.text
    assert "field_thinking" not in caplog.text


def test_a_property_under_its_own_name_is_warned_of(caplog):
    NamedProperties({"tool_calls": "tool_calls"}).check(Dataset.from_list(ROWS))
    assert "`message_property_mappings: {tool_calls: tool_calls}`: no message has" in caplog.text
    with pytest.raises(DatasetError, match="no message has the property `content`"):
        NamedProperties({"content": "content"}).check(Dataset.from_dict({"messages": [[{"role": "user"}]]}))


def test_columns_that_no_row_has(caplog):
    rows = Dataset.from_list([{**ROWS[0], "system": None}])
    NamedProperties(columns={"field_system": "system", "field_tools": "tools"}).check(rows)
    assert "`field_tools: tools`: the rows have no field `tools`" in caplog.text
    assert "field_system" not in caplog.text
    NamedProperties(columns={"field_system": "sytem"}).check(rows)
    said = (
        "`field_system: sytem`: the rows have no field `sytem`. Did you mean `system`? They have `messages`, `system`."
    )
    assert said in caplog.text


def strategy_of(tokenizer, **entry):
    return load("chat_template", tokenizer, DictDefault(sequence_len=256), DictDefault(type="chat_template", **entry))


def test_a_strategy_looks_before_it_tokenizes(tokenizer, caplog):
    entry = {"message_property_mappings": {"role": "from"}}
    with pytest.raises(DatasetError, match=r"\{role: from\}`: no message has the property `from`"):
        TokenizedPromptDataset(strategy_of(tokenizer, **entry), Dataset.from_list(ROWS))
    assert len(TokenizedPromptDataset(strategy_of(tokenizer), Dataset.from_list(ROWS))) == 3
    for entry, rows in (
        ({"field_tools": "toolz"}, ROWS),
        ({"type": {"field_input": "in"}}, [{"instruction": "I", "output": "O"}]),
    ):
        strategy = load(
            entry.get("type", "chat_template"), tokenizer, DictDefault(sequence_len=256), DictDefault(entry)
        )
        TokenizedPromptDataset(strategy, Dataset.from_list(rows))
    assert "`field_tools: toolz`: the rows have no field" in caplog.text
    assert "`field_input: in`: the rows have no field" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_the_dataset_is_named(tokenizer, tmp_path, caplog, streaming):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    mappings = {"role": "role", "content": "content", "reasoning_content": "thoughts"}
    entry = {"path": str(path), "type": "chat_template", "message_property_mappings": mappings}
    if streaming:
        entry["field_system"] = "sys"
    cfg = DictDefault(
        datasets=[entry],
        dataset_prepared_path=str(tmp_path / "prepared"),
        sequence_len=256,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        num_epochs=1,
        seed=1,
        streaming=streaming,
        max_steps=1,
    )
    if streaming:
        next(iter(prepare(cfg, tokenizer).train))
        said = caplog.text
        assert "These are the first 3 rows of the stream" in said
        assert f"dataset `path: {path}` `type: chat_template`: `field_system: sys`: the rows have no field" in said
    else:
        with pytest.raises(DatasetError) as error_info:
            prepare(cfg, tokenizer)
        said = str(error_info.value)
    assert f"dataset `path: {path}`" in said
    assert "no message has the property `thoughts`" in said
