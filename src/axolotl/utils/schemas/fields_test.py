"""Values are taken as YAML 1.1 parses what people write."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.deprecated import ALIASES, OBSOLETE, REMOVED, RENAMES


def read(text: str) -> AxolotlInputConfig:
    whole = {"base_model": "m", "learning_rate": 1e-4, "datasets": [{"path": "d", "type": "alpaca"}]}
    return AxolotlInputConfig(**(whole | yaml.safe_load(text)))


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 2e-4", "learning_rate", 2e-4),
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("loraplus_lr_embedding: 1e-6", "loraplus_lr_embedding", 1e-6),
        ("num_epochs: 3", "num_epochs", 3.0),
        ("sequence_len: '2048'", "sequence_len", 2048),
        ("sample_packing: yes", "sample_packing", True),
        ("sample_packing: 'off'", "sample_packing", False),
        ("save_strategy: no", "save_strategy", "no"),
        ("eval_strategy: 'No'", "eval_strategy", "no"),
        ("bf16: Auto", "bf16", "auto"),
        ("bf16: full", "bf16", "full"),
        ("bf16: true", "bf16", True),
        ("adapter: QLoRA\nload_in_4bit: true", "adapter", "qlora"),
        ("wandb_run_id: 12", "wandb_run_id", "12"),
        ("save_steps: 0.25", "save_steps", 0.25),
        ("eval_steps: 100\nval_set_size: 0.1", "eval_steps", 100),
        ("gpu_memory_limit: 20GiB", "gpu_memory_limit", "20GiB"),
        ("max_memory: {0: 20GiB, cpu: 100GiB}", "max_memory", {0: "20GiB", "cpu": "100GiB"}),
        ("optimizer: AdamW_Torch", "optimizer", "adamw_torch"),
        ("peft_layer_replication: [[0, 4], [2, 6]]\nadapter: lora", "peft_layer_replication", [(0, 4), (2, 6)]),
        ("added_tokens_overrides: {128041: '<a>'}", "added_tokens_overrides", {128041: "<a>"}),
        ("chat_template: tokenizer_default_fallback_chatml", "chat_template", "tokenizer_default_fallback_chatml"),
        ("chat_template: tokenizer_default:rag", "chat_template", "tokenizer_default:rag"),
        ("num_epochs:", "num_epochs", 1.0),
        ("output_dir:", "output_dir", "./model-out"),
        ("bf16:", "bf16", None),
        ("wandb_mode: ''", "wandb_mode", None),
        ("wandb_watch: false", "wandb_watch", False),
        ("chat_template: ChatML", "chat_template", "chatml"),
        ("lora_dropout: .05\nadapter: lora", "lora_dropout", 0.05),
    ],
)
def test_value_as_written(text, key, value):
    assert read(text).model_dump()[key] == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("micro_batch_size: true", "`micro_batch_size: true` cannot be used: expected a number"),
        ("val_set_size: yes", "expected a number"),
        ("learning_rate: .nan", "expected a number of at least 0"),
        ("learning_rate: .inf", "expected a finite number"),
        ("wandb_name: 1.10", "put the number in quotes"),
        ("revision_of_model: 1234567", "expected text"),
        ("micro_batch_size: 0", "expected a number of at least 1"),
        ("gradient_accumulation_steps: 2.5", "expected a whole number"),
        ("lora_dropout: 1.5", "expected a number of at most 1"),
        ("datasets: []", "expected at least 1"),
    ],
)
def test_value_that_cannot_be_meant(text, words):
    with pytest.raises(ValueError, match=words):
        read(text)


# What YAML may hold for a key, sensible or not.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 4)
    | st.floats()
    | st.sampled_from(["", "auto", "1e-4", "no", "x", "lora"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["path", "type", "beta", "x", 1]), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = st.sampled_from([*AxolotlInputConfig.model_fields, *ALIASES, *RENAMES, *REMOVED, *OBSOLETE, "x", 1, None])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_mapping_is_read_or_refused_in_words(data):
    base = {"base_model": "m", "learning_rate": 1e-4, "datasets": [{"path": "d", "type": "alpaca"}]}
    try:
        AxolotlInputConfig.model_validate(base | data)
    except ValidationError as refusal:
        assert "cannot be used: expected ." not in str(refusal)
