from __future__ import annotations

import pytest
from pydantic import create_model

from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.deprecated import OBSOLETE
from axolotl.utils.schemas.unknown import ENTRY_MODEL, PLUGIN_OF_PREFIX, nearest, unknown_keys


@pytest.mark.parametrize(
    ("data", "key", "near"),
    [
        ({"sample_paking": True}, "sample_paking", "sample_packing"),
        ({"learning-rate": 1}, "learning-rate", "learning_rate"),
        ({"Micro_Batch_Size": 1}, "Micro_Batch_Size", "micro_batch_size"),
        ({"datasets": [{"path": "a"}, {"pth": "b"}]}, "datasets.1.pth", "datasets.1.path"),
        ({"datasets": [{"type": {"fild_input": "b"}}]}, "datasets.0.type.fild_input", "datasets.0.type.field_input"),
        ({"test_datasets": [{"splitt": "b"}]}, "test_datasets.0.splitt", "test_datasets.0.split"),
        (
            {"pretraining_dataset": [{"text_colum": "b"}]},
            "pretraining_dataset.0.text_colum",
            "pretraining_dataset.0.text_column",
        ),
        ({"trl": {"bta": 0.1}}, "trl.bta", "trl.beta"),
        ({"peft": {"loftq_config": {"loftq_bit": 4}}}, "peft.loftq_config.loftq_bit", "peft.loftq_config.loftq_bits"),
        ({"lr_groups": [{"modles": []}]}, "lr_groups.0.modles", "lr_groups.0.modules"),
        ({"special_tokens": {"pad": "x"}}, "special_tokens.pad", "special_tokens.pad_token"),
        ({"fsdp_config": {"fsdp_ofload_params": True}}, "fsdp_config.fsdp_ofload_params", "fsdp_config.offload_params"),
    ],
)
def test_unknown_key_names_the_nearest_at_every_depth(data, key, near):
    ((error,), warnings) = unknown_keys(data, AxolotlInputConfig)
    assert error.startswith(f"`{key}` is not a key of ")
    assert error.endswith(f"Did you mean `{near}`?")
    assert warnings == []


def test_nothing_is_near_a_strange_word():
    ((error,), _) = unknown_keys({"zzzqqq": 1}, AxolotlInputConfig)
    assert "Did you mean" not in error


@pytest.mark.parametrize(
    "data",
    [
        {"overrides_of_model_config": {"anything": 1}, "bnb_config_kwargs": {"x": 1}, "lr_scheduler_kwargs": {"y": 2}},
        {"deepspeed": {"zero_optimization": {"stage": 3}}},
        {"peft_trainable_token_indices": {"embed_tokens": [1]}},
        {"datasets": [{"message_field_role": "from", "message_field_content": "value", "roles": {"user": ["human"]}}]},
        {"fsdp_config": {"fsdp_offload_params": True, "version": 2}},
        {"model_type": "x", "model_config": {}, "model_revision": "x", "epochs": 1, "type_of_model": "x"},
        {"max_memory": {0: "1GiB"}, "resources_per_worker": {"accelerator_type:L40S": 0.001}},
        {"selective_checkpointing": True},
        {"trl": None, "datasets": None, "peft": None},
        {"datasets": "not a list", "trl": 5, "lr_groups": {"a": 1}} | {"lr_groups": None},
    ],
)
def test_free_sections_other_spellings_and_wrong_types_are_not_unknown_keys(data):
    assert unknown_keys(data, AxolotlInputConfig) == ([], [])


def test_keys_of_an_entry_depend_on_the_method():
    entry = {"path": "a", "type": "chatml.intel", "field_chosen": "c"}
    assert unknown_keys({"rl": "dpo", "datasets": [entry]}, AxolotlInputConfig) == ([], [])
    ((error,), _) = unknown_keys({"datasets": [entry]}, AxolotlInputConfig)
    assert "`datasets.0.field_chosen`" in error


@pytest.mark.parametrize("key", OBSOLETE)
def test_key_of_an_older_version_is_a_warning(key):
    errors, (warning,) = unknown_keys({key: 1}, AxolotlInputConfig)
    assert errors == []
    assert warning == f"`{key}` has no effect any more: {OBSOLETE[key]}."


def test_key_of_an_older_version_that_was_left_blank_says_nothing():
    assert unknown_keys(dict.fromkeys(OBSOLETE), AxolotlInputConfig) == ([], [])


def test_environment_turns_errors_into_warnings(monkeypatch):
    monkeypatch.setenv("AXOLOTL_UNKNOWN_KEYS", "warn")
    errors, (warning,) = unknown_keys({"sample_paking": True}, AxolotlInputConfig)
    assert errors == []
    assert "`sample_packing`" in warning


def test_key_of_a_plugin_that_is_not_listed_names_the_plugin():
    ((error,), _) = unknown_keys({"liger_rope": True}, AxolotlInputConfig)
    assert "axolotl.integrations.liger.LigerPlugin" in error


def test_keys_that_a_plugin_adds_are_known_and_their_neighbours_suggested():
    from axolotl.integrations.spectrum.args import SpectrumArgs

    model = create_model("WithSpectrum", __base__=(AxolotlInputConfig, SpectrumArgs))
    assert unknown_keys({"spectrum_top_fraction": 0.5}, model) == ([], [])
    ((error,), _) = unknown_keys({"spectrum_top_frac": 0.5}, model)
    assert error.endswith("Did you mean `spectrum_top_fraction`?")


def test_every_prefix_belongs_to_a_key_of_its_plugin():
    from axolotl.cli.config_schema import plugin_models

    models = plugin_models()
    for prefix, plugin in PLUGIN_OF_PREFIX.items():
        assert any(name.startswith(prefix) for name in models[plugin].model_fields), prefix
    for plugin, model in models.items():
        for name in model.model_fields:
            if name not in AxolotlInputConfig.model_fields:
                assert any(name.startswith(prefix) for prefix, owner in PLUGIN_OF_PREFIX.items() if owner == plugin), (
                    name
                )


def test_tables_name_keys_that_exist():
    assert set(ENTRY_MODEL) <= set(AxolotlInputConfig.model_fields)


def test_nearest_prefers_the_likest():
    assert nearest("warmup_step", ["warmup_ratio", "warmup_steps"]) == "warmup_steps"
    assert nearest("x", ["warmup_ratio"]) is None
