from __future__ import annotations

import pytest

from axolotl.utils.schemas.config import FIELDS_ONLY, AxolotlInputConfig
from axolotl.utils.schemas.datasets import (
    DPODataset,
    KTODataset,
    PretrainingDataset,
    SFTDataset,
    StepwiseSupervisedDataset,
    SyntheticDataset,
    UserDefinedDPOType,
    UserDefinedKTOType,
    UserDefinedPrompterType,
)
from axolotl.utils.schemas.utils import handle_legacy_message_fields_logic


def entry(rl=None, key="datasets", **values):
    data = {"base_model": "m", "learning_rate": 1e-4, key: [values]}
    if rl:
        data["rl"] = rl
    return getattr(AxolotlInputConfig.model_validate(data, context=FIELDS_ONLY), key)[0]


@pytest.mark.parametrize("key", ["datasets", "test_datasets"])
@pytest.mark.parametrize(
    ("rl", "type_", "model"),
    [
        (None, "alpaca", SFTDataset),
        (None, "stepwise_supervised", StepwiseSupervisedDataset),
        (None, "_synthetic", SyntheticDataset),
        ("dpo", "chatml.intel", DPODataset),
        ("DPO", "chatml.intel", DPODataset),
        ("ipo", "chatml", DPODataset),
        ("simpo", "chatml", DPODataset),
        ("kto", "llama3.argilla", KTODataset),
        ("orpo", "chat_template.argilla", SFTDataset),
        ("grpo", "rewards.transform", SFTDataset),
        ("dpo", "_synthetic", SyntheticDataset),
    ],
)
def test_model_of_an_entry_follows_from_method_and_type(key, rl, type_, model):
    assert type(entry(rl, key, path="synthetic", type=type_)) is model


@pytest.mark.parametrize(
    ("rl", "type_", "model"),
    [
        (None, {"field_instruction": "q", "format": "{instruction}"}, UserDefinedPrompterType),
        ("dpo", {"field_prompt": "q", "chosen_format": "{chosen}"}, UserDefinedDPOType),
        ("kto", {"field_label": "ok"}, UserDefinedKTOType),
    ],
)
def test_type_may_be_a_mapping(rl, type_, model):
    assert type(entry(rl, path="d", type=type_).type) is model


def test_pretraining_entries():
    assert type(entry(key="pretraining_dataset", path="d")) is PretrainingDataset
    assert entry(key="pretraining_dataset", path="d").text_column == "text"
    assert type(entry(key="pretraining_dataset", path="d", type="chat_template")) is SFTDataset


def test_legacy_message_fields_become_mappings():
    found = entry(path="d", type="chat_template", message_field_role="from", message_field_content="value")
    assert found.message_property_mappings == {"role": "from", "content": "value"}


def test_training_marks_of_a_message_are_keys_in_their_own_right():
    found = entry(path="d", message_field_training="train", message_field_training_detail="detail")
    assert (found.message_field_training, found.message_field_training_detail) == ("train", "detail")
    assert found.message_property_mappings is None


def test_both_ways_to_map_a_property():
    same = {"message_field_role": "from", "message_property_mappings": {"role": "from"}}
    assert handle_legacy_message_fields_logic(same) == {"message_property_mappings": {"role": "from"}}
    with pytest.raises(ValueError, match="Conflicting message property fields"):
        handle_legacy_message_fields_logic({**same, "message_field_role": "who"})


def test_legacy_logic_leaves_its_input_alone():
    mappings = {"content": "value"}
    data = {"message_field_role": "from", "message_property_mappings": mappings}
    handle_legacy_message_fields_logic(data)
    assert data == {"message_field_role": "from", "message_property_mappings": {"content": "value"}}
    assert mappings == {"content": "value"}


@pytest.mark.parametrize("name", ["wiki", ["wiki", "books"], 2021])
def test_name_may_be_a_list_or_a_year(name):
    assert entry(path="d", name=name).name == (str(name) if isinstance(name, int) else name)
