from __future__ import annotations

import pytest

from axolotl._not_built import NO_EFFECT_YET, NOT_BUILT, PLUGINS_NOT_BUILT, not_built_problems
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.unknown import PLUGIN_OF_PREFIX

# Any value of these keys that asks for something.
ASKING = {
    "rl": "dpo",
    "deepspeed": "zero1.json",
    "fsdp": ["full_shard"],
    "fsdp_config": {"offload_params": True},
    "pretraining_dataset": [{"path": "d"}],
    "gradient_checkpointing": "offload",
    "optimizer": "muon",
}


@pytest.mark.parametrize("key", NOT_BUILT)
def test_key_that_asks_for_something_is_refused_by_name(key):
    (problem,) = not_built_problems({key: ASKING.get(key, 2)})
    assert problem.startswith(f"`{key}: ")
    assert "is not implemented yet." in problem


def test_a_config_of_defaults_is_never_refused():
    whole = AxolotlInputConfig(base_model="m", learning_rate=1e-4, datasets=[{"path": "d"}])
    assert not_built_problems(whole.model_dump()) == []


@pytest.mark.parametrize("key", NOT_BUILT)
@pytest.mark.parametrize("value", [None, False])
def test_key_that_is_switched_off_is_never_refused(key, value):
    assert not_built_problems({key: value}) == []


@pytest.mark.parametrize(
    "cfg",
    [
        {"gradient_checkpointing": True},
        {"optimizer": "adamw_torch_fused"},
        {"optimizer": "paged_adamw_8bit"},
        {"context_parallel_size": 1, "tensor_parallel_size": 1},
        {"plugins": ["my_package.MyPlugin"]},
        {"plugins": "not a list", "context_parallel_size": "x"},
    ],
)
def test_values_that_are_built(cfg):
    assert not_built_problems(cfg) == []


@pytest.mark.parametrize("plugin", PLUGINS_NOT_BUILT)
def test_plugin_is_refused_under_both_of_its_names(plugin):
    short = plugin.removeprefix("axolotl.integrations.")
    for name in (plugin, short):
        assert not_built_problems({"plugins": [name]}) == [f"`plugins: [{name}]` is not implemented yet. Remove it."]


def test_tables_name_what_exists():
    assert {*NOT_BUILT, *NO_EFFECT_YET} <= set(AxolotlInputConfig.model_fields)
    assert set(PLUGIN_OF_PREFIX.values()) >= PLUGINS_NOT_BUILT


def test_a_hint_is_accepted_and_said_to_do_nothing(caplog):
    from axolotl._not_built import LOG

    LOG.warning_once.cache_clear()
    LOG.logger.propagate = True
    with caplog.at_level("WARNING", logger="axolotl._not_built"):
        assert not_built_problems({"lora_mlp_kernel": True}) == []
    assert "`lora_mlp_kernel: True` has no effect yet" in caplog.text
