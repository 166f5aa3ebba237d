"""What is documented but not implemented here yet. Each row is deleted by the change that builds its feature.

`NOT_BUILT` refuses a key, or some of its values. `NO_EFFECT_YET` lists keys that only make a run faster or leaner: they are
accepted, and a warning says that they do nothing. A key left at null, false or its default is never refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

Refused = Callable[[Any], bool]


def is_set(value: Any) -> bool:
    """Null, false, 0 and empty text, lists and mappings switch a key off."""
    return bool(value)


def above_one(value: Any) -> bool:
    try:
        return float(value) > 1
    except (TypeError, ValueError):
        return False


def one_of(*words: str) -> Refused:
    return lambda value: isinstance(value, str) and value.strip().lower() in words


# Key -> (which of its values are refused, what else to write).
NOT_BUILT: dict[str, tuple[Refused, str]] = {
    "rl": (is_set, "Only supervised fine-tuning is."),
    "reward_model": (is_set, ""),
    "process_reward_model": (is_set, ""),
    "ebft": (is_set, ""),
    "qat": (is_set, ""),
    "quantization": (is_set, ""),
    "deepspeed": (is_set, "On several GPUs data parallel works without it."),
    "deepcompile": (is_set, ""),
    "fsdp": (is_set, "On several GPUs data parallel works without it."),
    "fsdp_config": (is_set, "On several GPUs data parallel works without it."),
    "fsdp_version": (is_set, "On several GPUs data parallel works without it."),
    "qlora_sharded_model_loading": (is_set, ""),
    "context_parallel_size": (above_one, ""),
    "tensor_parallel_size": (above_one, ""),
    "dp_shard_size": (above_one, ""),
    "dp_replicate_size": (above_one, ""),
    "use_ray": (is_set, "Use `--launcher torchrun`."),
    "processor_type": (is_set, "Only text models are."),
    "role_boundaries": (is_set, "Only text models are."),
    "freeze_mm_modules": (is_set, "Only text models are."),
    "fp8_enable_fsdp_float8_all_gather": (is_set, "Remove it: `fp8: true` works without."),
    "llama4_linearized_experts": (is_set, ""),
    "use_onebitllms": (is_set, ""),
    "fp32_norms": (is_set, ""),
    "gemma4_hybrid_attn_impl": (is_set, ""),
    "ple_cpu_offload": (is_set, ""),
    "quantize_moe_experts": (is_set, ""),
    "flash_optimum": (is_set, "Use `flash_attention: true`."),
    "optimizer": (
        one_of("polora"),
        "It is a package of its own, `polora`. Use `loraplus_lr_ratio` or `adamw_torch_fused`.",
    ),
}

# Plugins that come with this package but do nothing yet.
PLUGINS_NOT_BUILT = frozenset(
    f"axolotl.integrations.{name}"
    for name in """densemixer.DenseMixerPlugin diffusion.DiffusionPlugin
    expert_parallel.ExpertParallelPlugin hatchery.HatcheryPlugin kd.KDPlugin kernels.KernelsPlugin
    llm_compressor.LLMCompressorPlugin mora.MoraPlugin nemo_gym.NemoGymPlugin
    """.split()  # noqa: SIM905 - a list of quoted words would take a page
)

# Keys that are hints about speed or memory. The result of a run is the same with and without them.
NO_EFFECT_YET: dict[str, Refused] = {
    "flash_attn_fuse_mlp": is_set,
    "flash_attn_d512": is_set,
    "large_head_attention": one_of("triton_flash"),
    "fused_attn_kernel": is_set,
}

COMMANDS_NOT_BUILT = {
    "quantize": "",
    "vllm-serve": "",
    "merge-sharded-fsdp-weights": "",
    "delinearize-llama4": "",
    "agent-docs": "",
    "generate-cli-config-options": "`axolotl config-schema` prints every key.",
}


def not_built_problems(cfg: Mapping[str, Any]) -> list[str]:
    """One message per key of `cfg` whose feature is not implemented yet. Warns of keys that have no effect yet."""
    problems = [
        f"`{key}: {_short(cfg[key])}` is not implemented yet. {remedy}".rstrip()
        for key, (refused, remedy) in NOT_BUILT.items()
        if key in cfg and refused(cfg[key])
    ]
    problems += [
        f"`plugins: [{name}]` is not implemented yet. Remove it."
        for name in _plugins(cfg)
        if _whole(name) in PLUGINS_NOT_BUILT
    ]
    for key, idle in NO_EFFECT_YET.items():
        if idle(cfg.get(key)):
            LOG.warning_once(f"`{key}: {cfg[key]}` has no effect yet. The result of the run is the same without it.")
    return problems


def _plugins(cfg: Mapping[str, Any]) -> Iterable[str]:
    names = cfg.get("plugins")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list | tuple) else []


def _whole(name: str) -> str:
    """Our plugins may be named without the package they are in."""
    return name if name.startswith("axolotl.") else f"axolotl.integrations.{name}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
