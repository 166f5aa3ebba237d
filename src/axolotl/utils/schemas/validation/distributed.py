"""Several GPUs: DDP, FSDP, DeepSpeed, context and tensor parallelism, NPUs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from axolotl.exceptions import ConfigError
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.validation.common import (
    FLASH_LIBRARY_BACKENDS,
    fill,
    fsdp_option,
    fsdp_version,
    hub_kernel,
    more_than_one,
    optimizer_name,
    rl_method,
    torch_is_older_than,
)

LOG = get_logger(__name__)


def fsdp_version_is_known(cfg: DictDefault) -> None:
    """`fsdp_version` stands at the top level; left open, it is 1, which is on its way out."""
    if not (cfg.fsdp or cfg.fsdp_config):
        return
    nested = fsdp_option(cfg, "fsdp_version")
    if nested and cfg.fsdp_version and int(nested) != int(cfg.fsdp_version):
        raise ConfigError(
            f"`fsdp_version: {cfg.fsdp_version}` and `fsdp_config: {{fsdp_version: {nested}}}` differ. Keep the first."
        )
    if not cfg.fsdp_version:
        fill(cfg, "fsdp_version", nested or 1, "`fsdp_config.fsdp_version`" if nested else "no `fsdp_version` is set")
    if cfg.fsdp_config and not nested:
        cfg.fsdp_config.fsdp_version = cfg.fsdp_version
    if int(cfg.fsdp_version) != 2:
        LOG.warning(
            "FSDP1 will be deprecated in an upcoming release. Please set `fsdp_version: 2` and `fsdp_config` to use FSDP2."
        )


def fsdp_lists_are_fsdp_config_now(cfg: DictDefault) -> None:
    """The list `fsdp` is the older form of `fsdp_config`."""
    if cfg.fsdp:
        LOG.warning(
            "Configuring FSDP fields through the list `fsdp` is deprecated. Write `fsdp_config:` and `fsdp_version: 2`."
        )


def one_framework_shards_the_model(cfg: DictDefault) -> None:
    """DeepSpeed or FSDP."""
    if cfg.deepspeed and (cfg.fsdp or cfg.fsdp_config):
        raise ConfigError(
            "deepspeed and fsdp cannot be used together: both shard the model. Remove `deepspeed`, or `fsdp` and `fsdp_config`."
        )


def pinned_offload_is_an_option_of_fsdp2(cfg: DictDefault) -> None:
    """`cpu_offload_pin_memory: false` belongs to FSDP2 with offloaded parameters."""
    if fsdp_option(cfg, "cpu_offload_pin_memory") is not False:
        return
    if fsdp_version(cfg) != 2:
        raise ConfigError(
            "`fsdp_config: {cpu_offload_pin_memory: false}` requires FSDP2: FSDP1 does not support disabling cpu_offload_pin_memory. Set `fsdp_version: 2`."
        )
    if not fsdp_option(cfg, "offload_params"):
        raise ConfigError(
            "disabling cpu_offload_pin_memory requires enabling offload_params. Write `fsdp_config: {offload_params: true}`."
        )


def fsdp2_preferences_train_unquantized_models(cfg: DictDefault) -> None:
    """FSDP2 cannot shard the quantized reference model of preference training."""
    if (
        fsdp_version(cfg) == 2
        and rl_method(cfg) in ("dpo", "kto", "orpo", "ipo")
        and (cfg.load_in_8bit or cfg.load_in_4bit)
    ):
        key = "load_in_8bit" if cfg.load_in_8bit else "load_in_4bit"
        raise ConfigError(
            f"FSDP2 does not support load_in_8bit or load_in_4bit with {rl_method(cfg)}: `{key}: true`. Please use DeepSpeed or set `fsdp_version` to 1."
        )


def fsdp_shards_only_optimizers_that_can_be_cut(cfg: DictDefault) -> None:
    """8-bit optimizers of bitsandbytes keep state per block, which FSDP cannot cut or offload."""
    name = optimizer_name(cfg)
    if fsdp_version(cfg) == 1 and fsdp_option(cfg, "offload_params") and "8bit" in name:
        raise ConfigError(
            f"FSDP Offload not compatible with {name}: `optimizer: {name}` keeps its state on the GPU. Write `optimizer: adamw_torch_fused`."
        )
    if fsdp_version(cfg) == 2 and name in ("adamw_8bit", "adamw_bnb_8bit"):
        raise ConfigError(f"FSDP2 not compatible with {name}, use `adamw_torch_8bit` instead.")


def quantized_weights_are_loaded_by_every_rank(cfg: DictDefault) -> None:
    """Loading on one rank sends plain weights; quantized ones are made while loading."""
    if not fsdp_option(cfg, "cpu_ram_efficient_loading"):
        return
    if fsdp_version(cfg) == 2 and cfg.load_in_4bit:
        raise ConfigError(
            "FSDP2 does not support `cpu_ram_efficient_loading: true` with `load_in_4bit: true`. Write `cpu_ram_efficient_loading: false`."
        )
    if cfg.model_quantization_config == "Mxfp4Config":
        raise ConfigError(
            "`cpu_ram_efficient_loading: true` is not supported with `model_quantization_config: Mxfp4Config`. Write `cpu_ram_efficient_loading: false`."
        )


def fsdp2_needs_torch_2_7(cfg: DictDefault) -> None:
    """FSDP2 is complete from torch 2.7 on."""
    if cfg.fsdp_version and int(cfg.fsdp_version) == 2 and torch_is_older_than(cfg, "2.7.0"):
        raise ConfigError("FSDP2 is not supported on torch version < 2.7.0. Update torch, or set `fsdp_version: 1`.")


def wrapping_by_size_needs_a_size(cfg: DictDefault) -> None:
    """`auto_wrap_policy: SIZE_BASED_WRAP` needs `min_num_params`."""
    if fsdp_option(cfg, "auto_wrap_policy") == "SIZE_BASED_WRAP" and not fsdp_option(cfg, "min_num_params"):
        raise ConfigError(
            "`fsdp_config: {auto_wrap_policy: SIZE_BASED_WRAP}` requires min_num_params. Write `min_num_params: 100000000`, say."
        )


def fp32_norms_are_an_option_of_fsdp2(cfg: DictDefault) -> None:
    """Only FSDP2 mixes number formats within a group of layers."""
    if cfg.fp32_norms and fsdp_version(cfg) != 2:
        raise ConfigError(
            "`fp32_norms: true` requires FSDP2. Write `fsdp_config:` with `fsdp_version: 2`, or remove it."
        )
    if cfg.fp32_norm_classes and not cfg.fp32_norms:
        LOG.warning("`fp32_norm_classes` has no effect without `fp32_norms: true`.")


def parallel_sizes_are_one_unless_set(cfg: DictDefault) -> None:
    """Nothing is split over GPUs unless asked for."""
    for key in ("tensor_parallel_size", "context_parallel_size"):
        if cfg[key] is None:
            cfg[key] = 1


def context_parallel_runs_on_ring_flash_attention(cfg: DictDefault) -> None:
    """Sequences are split over GPUs by ring-flash-attn, which extends flash attention 2."""
    if not more_than_one(cfg.context_parallel_size):
        return
    size = cfg.context_parallel_size
    problems = []
    if hub_kernel(cfg.attn_implementation or "") not in ("flash_attention_2", "kernels-community/flash-attn2"):
        problems.append(
            f"`context_parallel_size: {size}`: flash_attention: true must be set with context_parallel_size > 1, but `attn_implementation: "
            f"{cfg.attn_implementation}`."
        )
    if cfg.sample_packing and (cfg.micro_batch_size or 1) > 1:
        problems.append(
            f"`micro_batch_size: {cfg.micro_batch_size}`: micro_batch_size must be set to 1 when sample_packing is enabled due to a "
            f"`ring-flash-attn` requirement (`context_parallel_size: {size}`)."
        )
    if importlib.util.find_spec("ring_flash_attn") is None:
        problems.append(
            f"`context_parallel_size: {size}` needs the package ring_flash_attn, which is not installed: pip install ring-flash-attn"
        )
    if problems:
        raise ConfigError(problems)
    LOG.warning(
        "Sequence parallelism (SP) is enabled with context_parallel_size=%s. Logged losses may differ slightly to the non-SP losses.",
        size,
    )
    if cfg.ring_attn_func is None:
        fill(
            cfg,
            "ring_attn_func",
            "varlen_llama3" if cfg.sample_packing else "batch_ring",
            f"`sample_packing: {bool(cfg.sample_packing)}`".lower(),
        )


def split_layers_need_an_optimizer_that_can_be_cut(cfg: DictDefault) -> None:
    """8-bit optimizers of bitsandbytes keep state per block, which does not follow a split layer."""
    name = optimizer_name(cfg)
    if more_than_one(cfg.tensor_parallel_size) and name in ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"):
        raise ConfigError(
            f"`tensor_parallel_size: {cfg.tensor_parallel_size}` is not compatible with `optimizer: {name}`: tensor parallelism needs an optimizer "
            "whose state can be split. Write `optimizer: adamw_torch_8bit`."
        )


def deepcompile_is_an_option_of_deepspeed(cfg: DictDefault) -> None:
    """`deepcompile` and tensor parallelism are written into the DeepSpeed config."""
    if cfg.deepcompile and not cfg.deepspeed:
        raise ConfigError(
            "`deepcompile: true` requires deepspeed to be set. Write `deepspeed: deepspeed_configs/zero3.json`."
        )
    if not cfg.deepspeed:
        return
    additions: dict = {}
    if cfg.deepcompile:
        additions["compile"] = {"deepcompile": True}
    if more_than_one(cfg.tensor_parallel_size):
        additions["tensor_parallel"] = {"autotp_size": cfg.tensor_parallel_size}
        additions["zero_optimization"] = {"gather_16bit_weights_on_model_save": True}
    if not additions:
        return
    if isinstance(cfg.deepspeed, str):
        path = Path(cfg.deepspeed)
        try:
            cfg.deepspeed = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as err:
            raise ConfigError(f"`deepspeed: {path}` cannot be read: {err}") from err
    cfg.deepspeed.update(additions)
    note_choice(cfg, "deepspeed", additions, "added for `deepcompile` and `tensor_parallel_size`")


def npus_lack_some_kernels(cfg: DictDefault) -> None:
    """Ascend NPUs have no CUDA kernels."""
    if importlib.util.find_spec("torch_npu") is None:
        return
    refused = {
        "attn_implementation": cfg.attn_implementation in (*FLASH_LIBRARY_BACKENDS, "sdpa"),
        "optimizer": "bit" in optimizer_name(cfg),
        "load_in_8bit": bool(cfg.load_in_8bit),
        "load_in_4bit": bool(cfg.load_in_4bit),
        "tf32": cfg.tf32 is True,
    }
    problems = [
        f"`{key}: {cfg[key]}` is not supported on NPU. Remove it." for key, is_refused in refused.items() if is_refused
    ]
    if problems:
        raise ConfigError(problems)


CHECKS = (
    fsdp_lists_are_fsdp_config_now,
    fsdp_version_is_known,
    one_framework_shards_the_model,
    pinned_offload_is_an_option_of_fsdp2,
    fsdp2_preferences_train_unquantized_models,
    fsdp_shards_only_optimizers_that_can_be_cut,
    quantized_weights_are_loaded_by_every_rank,
    fsdp2_needs_torch_2_7,
    wrapping_by_size_needs_a_size,
    fp32_norms_are_an_option_of_fsdp2,
    parallel_sizes_are_one_unless_set,
    context_parallel_runs_on_ring_flash_attention,
    split_layers_need_an_optimizer_that_can_be_cut,
    deepcompile_is_an_option_of_deepspeed,
    npus_lack_some_kernels,
)
