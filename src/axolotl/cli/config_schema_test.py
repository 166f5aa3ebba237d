from __future__ import annotations

import json

import pytest
import yaml

from axolotl.cli.config_schema import config_schema, field_schema, print_config_schema
from axolotl.exceptions import ConfigError
from axolotl.utils.schemas.config import AxolotlInputConfig

jsonschema = pytest.importorskip("jsonschema")

ORDINARY = """
base_model: NousResearch/Llama-3.2-1B
model_type: AutoModelForCausalLM
load_in_4bit: true
adapter: qlora
plugins:
  - axolotl.integrations.liger.LigerPlugin
liger_rope: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
    split: train[:1000]
  - path: my.jsonl
    type:
      field_instruction: q
      format: "{instruction}"
  - path: chat.jsonl
    type: chat_template
    message_field_role: from
learning_rate: 2e-4
epochs: 1
save_strategy: no
bf16: auto
deepspeed: deepspeed_configs/zero1.json
fsdp_config:
  fsdp_offload_params: true
special_tokens:
  pad_token: <pad>
wandb_run_id: 12
"""


@pytest.fixture(scope="module")
def validator():
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_schema_accepts_an_ordinary_config_as_yaml_parses_it(validator):
    assert [error.message for error in validator.iter_errors(yaml.safe_load(ORDINARY))] == []


@pytest.mark.parametrize(
    "change",
    [
        {"sample_paking": True},
        {"learning_rate": "fast"},
        {"micro_batch_size": 0},
        {"datasets": [{"pth": "a"}]},
        {"trl": {"bta": 1}},
        {"rl": "dpoo"},
        {"base_model": None},
    ],
)
def test_schema_refuses_what_the_program_refuses(validator, change):
    data = yaml.safe_load(ORDINARY) | change
    assert not validator.is_valid(data)
    with pytest.raises(ValueError):
        AxolotlInputConfig(**({"base_model": "m", "learning_rate": 1e-4, "datasets": [{"path": "d"}]} | change))


def test_field_comes_with_the_definitions_it_needs():
    schema = field_schema("datasets")
    jsonschema.Draft202012Validator.check_schema(schema)
    assert {"SFTDataset", "UserDefinedPrompterType"} <= set(schema["$defs"])
    assert "TRLConfig" not in schema["$defs"]


@pytest.mark.parametrize(
    "field", ["trl.beta", "--trl.beta".lstrip("-"), "datasets.type", "micro-batch-size", "liger_rope"]
)
def test_field_may_be_dotted_and_dashed(field):
    assert field_schema(field)["description"]


def test_unknown_field_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean `trl\.beta`"):
        field_schema("trl.bta")


def test_both_formats_say_the_same(capsys):
    print_config_schema("json")
    as_json = json.loads(capsys.readouterr().out)
    print_config_schema("yaml")
    assert yaml.safe_load(capsys.readouterr().out) == as_json == config_schema()
