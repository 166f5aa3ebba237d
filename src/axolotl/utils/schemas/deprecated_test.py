from __future__ import annotations

import pytest

from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.deprecated import ALIASES, OBSOLETE, OPTIMIZER_RENAMES, REMOVED, RENAMES, apply_renames
from axolotl.utils.schemas.enums import OPTIMIZERS


@pytest.mark.parametrize(("old", "new"), [*ALIASES.items(), *RENAMES.items()])
def test_old_name_becomes_the_new_one(old, new):
    cfg = DictDefault({old: 7})
    assert apply_renames(cfg) == []
    assert cfg == {new: 7}


@pytest.mark.parametrize(("old", "new"), [*ALIASES.items(), *RENAMES.items()])
def test_both_names_with_different_values_is_a_problem(old, new):
    (problem,) = apply_renames(DictDefault({old: 7, new: 8}))
    assert f"`{old}: 7`" in problem
    assert f"`{new}: 8`" in problem


def test_both_names_with_one_value_is_none():
    assert apply_renames(DictDefault({"epochs": 7, "num_epochs": 7})) == []


@pytest.mark.parametrize("key", REMOVED)
def test_removed_key_is_refused_with_a_remedy_unless_switched_off(key):
    (problem,) = apply_renames(DictDefault({key: True}))
    assert problem.startswith(f"`{key}: True` was removed; ")
    assert apply_renames(DictDefault({key: False})) == []
    assert apply_renames(DictDefault({key: None})) == []


def test_tables_name_keys_that_exist():
    known = set(AxolotlInputConfig.model_fields)
    assert {*ALIASES.values(), *RENAMES.values()} <= known
    assert set(OPTIMIZER_RENAMES.values()) <= OPTIMIZERS
    assert not set(OPTIMIZER_RENAMES) & (OPTIMIZERS - {"ao_adamw_4bit", "ao_adamw_8bit"})
    assert not set(OBSOLETE) & known


@pytest.mark.parametrize(
    ("steps", "after"),
    [
        (10, {"gc_collect_steps": 10, "torch_empty_cache_steps": 10}),
        (-1, {"gc_collect_steps": -1}),
        (0, {}),
    ],
)
def test_gc_steps_is_two_keys(steps, after):
    cfg = DictDefault(gc_steps=steps)
    apply_renames(cfg)
    assert cfg == after


def test_gc_steps_that_is_no_number_is_left_for_the_field_to_refuse():
    cfg = DictDefault(gc_steps="often")
    apply_renames(cfg)
    assert cfg == {"gc_steps": "often"}


@pytest.mark.parametrize("written", ["org/name", {"path": "org/name"}, [{"path": "org/name"}]])
def test_pretraining_dataset_may_be_one_entry(written):
    cfg = DictDefault(pretraining_dataset=written)
    apply_renames(cfg)
    assert cfg.pretraining_dataset == [{"path": "org/name"}]


def test_optimizer_of_older_files():
    cfg = DictDefault(optimizer="adamw_hf")
    apply_renames(cfg)
    assert cfg.optimizer == "adamw_torch"


def test_fsdp_prefix_is_dropped_but_not_of_the_version():
    cfg = DictDefault(
        fsdp_config={"fsdp_offload_params": True, "fsdp_version": 2}, fsdp_final_state_dict_type="FULL_STATE_DICT"
    )
    assert apply_renames(cfg) == []
    assert cfg.fsdp_config == {
        "offload_params": True,
        "fsdp_version": 2,
        "final_state_dict_type": "FULL_STATE_DICT",
    }


def test_fsdp_prefix_beside_another_value_is_a_problem():
    (problem,) = apply_renames(DictDefault(fsdp_config={"fsdp_offload_params": True, "offload_params": False}))
    assert "`fsdp_offload_params: True`" in problem


def test_pickled_weights_are_refused():
    assert "safetensors" in apply_renames(DictDefault(save_safetensors=False))[0]


def test_renaming_again_changes_nothing():
    cfg = DictDefault(epochs=3, model_type="LlamaForCausalLM", gc_steps=5, optimizer="lion")
    apply_renames(cfg)
    once = cfg.copy()
    assert apply_renames(cfg) == []
    assert cfg == once
