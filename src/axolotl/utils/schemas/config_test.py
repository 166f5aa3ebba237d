from __future__ import annotations

import subprocess
import sys

import pytest

from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import NAMES, AxolotlConfigWCapabilities, AxolotlInputConfig
from axolotl.utils.schemas.enums import TRANSFORMERS_OPTIMIZERS, TRANSFORMERS_SCHEDULERS

GOOD = {"base_model": "m", "learning_rate": "2e-4", "datasets": [{"path": "d", "type": "alpaca"}]}


def test_direct_use_applies_renames_and_checks():
    cfg = AxolotlInputConfig(
        **DictDefault(GOOD | {"epochs": 2, "model_type": "LlamaForCausalLM", "sample_packing": True})
    )
    assert cfg.num_epochs == 2
    assert cfg.type_of_model == "LlamaForCausalLM"
    assert cfg.eval_sample_packing is True
    assert cfg.seed == 42


def test_direct_use_refuses_everything_at_once():
    bad = {"lora_r": "x", "sample_paking": 1, "rpo_alpha": 1.0}
    with pytest.raises(ValueError) as info:
        AxolotlInputConfig(**GOOD, **bad)
    for words in ("`lora_r: x`", "`sample_packing`", "`rpo_alpha: 1.0` was removed"):
        assert words in str(info.value)


def test_direct_use_runs_the_checks_across_groups():
    with pytest.raises(ValueError, match="warmup_steps"):
        AxolotlInputConfig(**GOOD, warmup_steps=5, warmup_ratio=0.1)


def test_validating_a_validated_config_changes_nothing():
    once = AxolotlInputConfig(**GOOD, sample_packing=True, flash_attention=True).model_dump(exclude_none=True)
    assert AxolotlInputConfig(**once).model_dump(exclude_none=True) == once


def test_dump_is_plain_data():
    import yaml

    cfg = AxolotlInputConfig(**GOOD, rl="dpo", chat_template="llama3", qat={"weight_dtype": "fp8"})
    dumped = cfg.model_dump(exclude_none=True)
    assert yaml.safe_load(yaml.safe_dump(dumped)) == dumped
    assert dumped["rl"] == "dpo"
    assert dumped["qat"]["weight_dtype"] == "float8_e4m3fn"


def test_capabilities_ride_along():
    cfg = AxolotlConfigWCapabilities(
        **GOOD,
        capabilities={"bf16": True, "n_gpu": 8, "compute_capability": "sm_90"},
        env_capabilities={"torch_version": "2.13.0"},
    )
    assert cfg.capabilities.n_gpu == 8
    assert cfg.env_capabilities.torch_version == "2.13.0"


def test_every_key_is_described_in_one_line():
    for name, field in AxolotlInputConfig.model_fields.items():
        assert field.description, name
        assert "\n" not in field.description, name
        assert len(field.description) <= 180, name


def test_rl_and_plugins_are_read_before_the_keys_that_look_at_them():
    order = list(AxolotlInputConfig.model_fields)
    dependent = ["datasets", "test_datasets", "pretraining_dataset", *NAMES]
    assert max(order.index("rl"), order.index("plugins")) < min(order.index(name) for name in dependent)


@pytest.mark.parametrize("key", ["optimizer", "lr_scheduler"])
def test_a_name_of_ones_own_needs_a_plugin(key):
    with pytest.raises(ValueError, match=f"`{key}: my_own`"):
        AxolotlInputConfig(**GOOD, **{key: "my_own"})
    assert getattr(AxolotlInputConfig(**GOOD, plugins=["my.Plugin"], **{key: "my_own"}), key) == "my_own"


def test_optimizer_and_scheduler_names_are_those_of_transformers():
    pytest.importorskip("transformers")
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    # An older transformers may lack the newest names; none of its own may be missing here.
    removed = {"adamw_apex_fused", "adamw_hf"}
    assert {name.value for name in OptimizerNames} - removed <= TRANSFORMERS_OPTIMIZERS
    assert {name.value for name in SchedulerType} <= TRANSFORMERS_SCHEDULERS


def test_schema_loads_nothing_heavy():
    code = (
        "import sys, axolotl.utils.schemas.config as c;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'peft', 'PIL') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("name", ["bilinear", "Bicubic", "lanczos"])
def test_resampling_has_the_values_of_pillow(name):
    image = pytest.importorskip("PIL.Image")
    from axolotl.utils.schemas.multimodal import MultiModalConfig

    value = MultiModalConfig.convert_image_resize_algorithm(name)
    assert value == image.Resampling[name.upper()]
    assert MultiModalConfig(image_resize_algorithm=name).image_resize_algorithm == value
    assert MultiModalConfig(image_resize_algorithm=value).image_resize_algorithm == value


def test_other_resampling_is_refused():
    with pytest.raises(ValueError):
        AxolotlInputConfig(**GOOD, image_resize_algorithm="nearest")
