"""Keys of our plugins: the rules of each, and that each plugin brings its own."""

from __future__ import annotations

import importlib

import pytest
from pydantic import BaseModel

from axolotl.integrations.base import BasePlugin
from axolotl.integrations.cut_cross_entropy.args import CutCrossEntropyArgs
from axolotl.integrations.diffusion.args import DiffusionArgs
from axolotl.integrations.expert_parallel.args import ExpertParallelArgs
from axolotl.integrations.kernels.args import KernelsArgs
from axolotl.integrations.liger.args import LigerArgs
from axolotl.integrations.mora.args import MoraArgs
from axolotl.integrations.nemo_gym.args import NemoGymArgs
from axolotl.integrations.spectrum.args import SpectrumArgs
from axolotl.integrations.swanlab.args import SwanLabConfig
from axolotl.utils.schemas.unknown import PLUGIN_OF_PREFIX


@pytest.mark.parametrize("path", sorted(set(PLUGIN_OF_PREFIX.values())))
def test_plugin_is_found_at_its_documented_path_and_brings_its_keys(path):
    module, _, name = path.rpartition(".")
    plugin = getattr(importlib.import_module(module), name)()
    assert isinstance(plugin, BasePlugin)
    args_module, _, args_name = plugin.get_input_args().rpartition(".")
    model = getattr(importlib.import_module(args_module), args_name)
    assert issubclass(model, BaseModel)
    assert getattr(importlib.import_module(module), args_name) is model
    assert all(field.description for field in model.model_fields.values())


GYM = {"nemo_gym_config_paths": ["a.yml"], "nemo_gym_datasets": [{"path": "d"}]}
MERGE_AWARE = {"nvfp4_merge_aware": True, "expert_backend": "sonicmoe", "adapter": "lora"}


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (CutCrossEntropyArgs, {"bf16": False}, "fp16/bf16"),
        (CutCrossEntropyArgs, {"chunked_cross_entropy": True}, "chunked_cross_entropy"),
        (LigerArgs, {"liger_swiglu": True, "liger_glu_activation": True}, "both `liger_swiglu`"),
        (
            LigerArgs,
            {"liger_glu_activation": True, "tiled_mlp": True, "tiled_mlp_use_original_mlp": False},
            "tiled_mlp_use_original_mlp: true",
        ),
        (LigerArgs, {"liger_rms_norm": True, "tensor_parallel_size": 2}, "tensor_parallel_size: 2"),
        (LigerArgs, {"liger_fused_linear_cross_entropy": True, "tensor_parallel_size": 2}, "tensor_parallel_size: 2"),
        (LigerArgs, {"liger_use_token_scaling": True}, "liger_fused_linear_cross_entropy"),
        (LigerArgs, {"liger_kernel_impl": "triton"}, "cutile"),
        (KernelsArgs, {"use_scattermoe": True, "use_sonicmoe": True}, "exclude each other"),
        (KernelsArgs, {"use_scattermoe": True, "expert_backend": "sonicmoe"}, "contradicts"),
        (KernelsArgs, {"expert_backend": "fast"}, "scattermoe"),
        (KernelsArgs, {"moe_grouped_backend": "dequant"}, "marlin"),
        (KernelsArgs, {"moe_dequant_chunk_size": 0}, "greater than or equal to 1"),
        (KernelsArgs, {"nvfp4_merge_aware_start_step": 5}, "needs `nvfp4_merge_aware: true`"),
        (KernelsArgs, MERGE_AWARE | {"expert_backend": "eager"}, "sonicmoe"),
        (KernelsArgs, MERGE_AWARE | {"adapter": "qlora"}, "adapter: lora"),
        (KernelsArgs, MERGE_AWARE | {"lora_qkv_kernel": True}, "lora_qkv_kernel"),
        (ExpertParallelArgs, {"expert_parallel_size": 0}, "greater than or equal to 1"),
        (NemoGymArgs, {"nemo_gym_datasets": [{"path": "d"}]}, "nemo_gym_config_paths"),
        (NemoGymArgs, {"nemo_gym_config_paths": ["a.yml"]}, "nemo_gym_datasets"),
        (DiffusionArgs, {"diffusion": {"min_mask_ratio": 0.9, "max_mask_ratio": 0.1}}, "must be ≤"),
        (SwanLabConfig, {}, "swanlab_project"),
        (SwanLabConfig, {"swanlab_project": "  "}, "swanlab_project"),
        (SwanLabConfig, {"swanlab_project": "p", "swanlab_mode": "mars"}, "cloud"),
        (SpectrumArgs, {"fsdp_config": {"offload_params": True}}, "use_orig_params"),
        (MoraArgs, {"mora": {"mora_type": 3}}, "sharing"),
    ],
)
def test_rule_of_a_plugin(model, data, words):
    with pytest.raises(ValueError, match=words):
        model.model_validate(data)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (CutCrossEntropyArgs, {}),
        (CutCrossEntropyArgs, {"cut_cross_entropy": False, "bf16": False, "chunked_cross_entropy": True}),
        (LigerArgs, {"liger_rope": True, "liger_kernel_impl": "CuTile", "tensor_parallel_size": 1}),
        (LigerArgs, {"liger_use_token_scaling": True, "liger_fused_linear_cross_entropy": True}),
        (KernelsArgs, MERGE_AWARE),
        (KernelsArgs, {"use_scattermoe": True, "expert_backend": "ScatterMoE"}),
        (NemoGymArgs, GYM),
        (NemoGymArgs, {"nemo_gym_enabled": False}),
        (NemoGymArgs, {"nemo_gym_auto_start": False, "nemo_gym_datasets": [{"path": "d"}]}),
        (SwanLabConfig, {"use_swanlab": False}),
        (SpectrumArgs, {"fsdp_config": {"use_orig_params": True}}),
        (SpectrumArgs, {"fsdp_config": {"fsdp_use_orig_params": True}}),
        (DiffusionArgs, {}),
    ],
)
def test_what_the_rules_allow(model, data):
    model.model_validate(data)


def test_liger_swiglu_is_read_under_its_new_name():
    assert LigerArgs(liger_swiglu=True).liger_glu_activation is True


@pytest.mark.parametrize(("written", "name"), [(1, "sharing"), (6, "rope"), ("6", "rope"), ("Sharing", "sharing")])
def test_mora_types_have_numbers(written, name):
    assert MoraArgs(mora={"mora_type": written}).mora.mora_type == name
