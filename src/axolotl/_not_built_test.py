from __future__ import annotations

import re
from pathlib import Path

import pytest

from axolotl._not_built import NO_EFFECT_YET, NOT_BUILT, PLUGINS_NOT_BUILT, not_built_problems
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.deprecated import DeprecatedParameters
from axolotl.utils.schemas.internal import InternalConfig
from axolotl.utils.schemas.unknown import PLUGIN_OF_PREFIX

# Keys that only say how another one is done -> that one. It is refused, so they are never silently ignored.
PART_OF = {
    "rl": """trl vllm rl_beta rl_adapter_ref_model dpo_label_smoothing dpo_loss_type dpo_loss_weights dpo_padding_free
        dpo_use_liger_kernel dpo_use_weighting precompute_ref_log_probs cpo_alpha simpo_gamma kto_desirable_weight
        kto_undesirable_weight""",
    "reward_model": "center_rewards_coefficient",
    "fp32_norms": "fp32_norm_classes",
    "context_parallel_size": "heads_k_stride ring_attn_func",
    "use_ray": "ray_num_workers ray_run_name resources_per_worker",
}
# `cli/utils/tracking.py` hands every key with these prefixes to its tracker.
HANDED_ON = ("wandb_", "mlflow_", "comet_", "trackio_")
# True of every run, or without consequence for one: columns that the model does not take never reach it.
# `tiled_mlp` always tiles the model's own MLP.
ALWAYS = {
    "tiled_mlp_use_original_mlp",
    "low_cpu_mem_usage",
    "relora_cpu_offload",
    "save_safetensors",
    "experimental_skip_move_to_device",
    "remove_unused_columns",
}

# Any value of these keys that asks for something.
ASKING = {
    "rl": "dpo",
    "deepspeed": "zero1.json",
    "fsdp": ["full_shard"],
    "fsdp_config": {"offload_params": True},
    "optimizer": "polora",
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


@pytest.mark.parametrize("plugin", sorted(PLUGINS_NOT_BUILT))
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
        assert not_built_problems({"large_head_attention": "sdpa", "fused_attn_kernel": False}) == []
        assert not caplog.text
        assert not_built_problems({"large_head_attention": "triton_flash"}) == []
    assert "`large_head_attention: triton_flash` has no effect yet" in caplog.text


def test_no_key_is_silently_ignored():
    root = Path(__file__).parent
    code = "".join(
        path.read_text("utf-8")
        for path in root.rglob("*.py")
        if not path.name.endswith("_test.py")
        and path.name not in ("_not_built.py", "args.py")
        # The fields themselves do not count, the checks do not either: they read keys only to judge them.
        and "schemas" not in path.parts
    )
    read = set(re.findall(r"cfg\.(\w+)", code)) | set(re.findall(r"[\"'](\w+)[\"']", code))
    parts = {key for whole, words in PART_OF.items() if whole in NOT_BUILT for key in words.split()}
    excused = {
        *NOT_BUILT,
        *NO_EFFECT_YET,
        *parts,
        *ALWAYS,
        *InternalConfig.model_fields,
        *DeprecatedParameters.model_fields,
    }
    ignored = [
        key
        for key in AxolotlInputConfig.model_fields
        if key not in read and key not in excused and not key.startswith(HANDED_ON)
    ]
    assert ignored == []
