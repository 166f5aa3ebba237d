from __future__ import annotations

import pytest
from pydantic import ValidationError

from axolotl.utils.schemas.config import FIELDS_ONLY, AxolotlInputConfig
from axolotl.utils.schemas.errors import explain

GOOD = {"base_model": "m", "learning_rate": 1e-4, "datasets": [{"path": "d", "type": "alpaca"}]}


def lines(**changes):
    data = GOOD | changes
    with pytest.raises(ValidationError) as info:
        AxolotlInputConfig.model_validate(data, context=FIELDS_ONLY)
    return explain(info.value, data)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"lora_r": "abc"}, "`lora_r: abc` cannot be used: expected a whole number."),
        ({"lora_r": 2**63}, f"`lora_r: {2**63}` cannot be used: expected a smaller number."),
        ({"sample_packing": "maybe"}, "`sample_packing: maybe` cannot be used: expected true or false."),
        ({"bf16": "fulll"}, "`bf16: fulll` cannot be used: expected auto, full or true or false. Did you mean `full`?"),
        ({"output_dir": "a\0"}, "`output_dir: a\0` cannot be used: expected text without a zero byte."),
        ({"base_model": ["m"]}, "`base_model: ['m']` cannot be used: expected text."),
        ({"plugins": "a.B"}, "`plugins: a.B` cannot be used: expected a list."),
        ({"datasets": {"path": "d"}}, "`datasets: {'path': 'd'}` cannot be used: expected a list."),
        ({"datasets": ["d"]}, "`datasets.0: d` cannot be used: expected a mapping."),
        ({"datasets": [{"path": "d", "type": 5}]}, "`datasets.0.type: 5` cannot be used: expected text or a mapping."),
        ({"trl": [1]}, "`trl: [1]` cannot be used: expected a mapping."),
        ({"val_set_size": -0.1}, "`val_set_size: -0.1` cannot be used: expected a number of at least 0."),
        ({"lr_groups": [{"name": "a", "lr": 1}]}, "`lr_groups.0.modules` is missing. Write `modules: ...`."),
        (
            {"trl": {"vllm_mode": "colocat"}},
            "`trl.vllm_mode: colocat` cannot be used: expected server or colocate. Did you mean `colocate`?",
        ),
        (
            {"qat": {"weight_dtype": "nvfp"}},
            "`qat.weight_dtype: nvfp` cannot be used: expected int4, int8, float8_e4m3fn, nvfp4, mxfp4 or ternary. "
            "Did you mean `nvfp4`?",
        ),
        (
            {"datasets": [{"path": "d", "type": {"field_input": ["a"]}}]},
            "`datasets.0.type.field_input: ['a']` cannot be used: expected text.",
        ),
    ],
)
def test_one_line_in_the_users_words(changes, line):
    assert lines(**changes) == [line]


def test_long_lists_of_names_are_not_printed():
    (line,) = lines(optimizer="adamw_torc")
    assert line.startswith("`optimizer: adamw_torc` cannot be used: expected one of ")
    assert line.endswith("Did you mean `adamw_torch`?")
    assert len(line) < 200


def test_every_wrong_value_gets_its_line():
    found = lines(lora_r="abc", micro_batch_size=0, datasets=[{"path": "a"}, {"path": "b", "train_on_eos": "lst"}])
    assert len(found) == 3
    assert any(line.startswith("`datasets.1.train_on_eos: lst`") and line.endswith("`last`?") for line in found)


def test_missing_key():
    with pytest.raises(ValidationError) as info:
        AxolotlInputConfig.model_validate({"learning_rate": 1}, context=FIELDS_ONLY)
    assert explain(info.value, {"learning_rate": 1}) == ["`base_model` is missing. Write `base_model: ...`."]


def test_no_word_of_pydantic_reaches_the_user():
    found = lines(
        lora_target_modules=5, peft_layer_replication=[[1]], device_map=object, fp8_config={"recipe": 1}, max_memory=[1]
    )
    for line in found:
        assert not any(
            word in line for word in ("pydantic", "input_value", "Input should", "instance of", "str_type")
        ), line


def test_messages_of_validators_are_kept():
    entry = {"path": "d", "message_field_role": "from", "message_property_mappings": {"role": "who"}}
    (line,) = lines(datasets=[entry])
    assert line.startswith("`datasets.0`: Conflicting message property fields for `role`")
