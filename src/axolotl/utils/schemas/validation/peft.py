"""Adapters and quantized base models."""

from __future__ import annotations

import re

from axolotl.exceptions import ConfigError
from axolotl.integrations.base import AdapterCapabilities, PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.validation.common import (
    LORA_KERNELS,
    fill,
    fsdp_version,
    is_lora,
    is_reentrant,
    num_gpus,
    torch_is_older_than,
)

LOG = get_logger(__name__)

OUR_ADAPTERS = {
    "lora": AdapterCapabilities("lora", relora=True),
    "qlora": AdapterCapabilities("qlora", relora=True),
    "llama-adapter": AdapterCapabilities("llama-adapter", lora_like=False),
}
# Layers with several experts; torch.compile-like fusing of their LoRA needs torch 2.9.
EXPERT_MODELS = ("moe", "mixtral", "a3b", "a22b", "gpt-oss", "deepseek-v", "dbrx", "jamba")


def adapter_is_known(cfg: DictDefault) -> None:
    """`adapter` is lora, qlora, llama-adapter, or one that a plugin brings."""
    if not cfg.adapter:
        return
    from_plugins = PluginManager.get_instance().get_adapter_capabilities() if cfg.plugins else {}
    if cfg.adapter not in OUR_ADAPTERS and cfg.adapter not in from_plugins:
        known = ", ".join([*OUR_ADAPTERS, *from_plugins])
        raise ConfigError(
            f"`adapter: {cfg.adapter}` is not known. Write one of {known}, or list the plugin that brings it under `plugins:`."
        )


def quantized_weights_train_through_an_adapter(cfg: DictDefault) -> None:
    """Weights in 8 or 4 bits take no gradient step."""
    if not cfg.adapter and not cfg.inference and (cfg.load_in_8bit or cfg.load_in_4bit):
        key = "load_in_8bit" if cfg.load_in_8bit else "load_in_4bit"
        raise ConfigError(
            f"load_in_8bit and load_in_4bit are not supported without setting an adapter for training. If you want to full finetune, please turn "
            f"off `{key}`; else write `adapter: {'lora' if cfg.load_in_8bit else 'qlora'}`."
        )


def a_model_is_loaded_in_8_or_in_4_bits(cfg: DictDefault) -> None:
    """Not both."""
    if cfg.load_in_8bit and cfg.load_in_4bit:
        raise ConfigError("`load_in_8bit: true` and `load_in_4bit: true` cannot be used together. Keep one.")


def qlora_trains_on_4_bits(cfg: DictDefault) -> None:
    """QLoRA loads the base in 4 bits, and merges into a base that is not quantized."""
    if cfg.adapter != "qlora":
        return
    problems = []
    if cfg.merge_lora:
        problems += [
            f"Can't merge qlora if {text}. Remove `{key}`; the merge reads the base as it is stored."
            for key, text in (("load_in_8bit", "loaded in 8bit"), ("gptq", "gptq"), ("load_in_4bit", "loaded in 4bit"))
            if cfg[key]
        ]
    else:
        if cfg.load_in_8bit:
            problems.append(
                "Can't load qlora in 8bit: `adapter: qlora` with `load_in_8bit: true`. Write `load_in_4bit: true`, or `adapter: lora`."
            )
        if cfg.gptq:
            problems.append("Can't load qlora if gptq: `adapter: qlora` with `gptq: true`. Write `adapter: lora`.")
        if not cfg.load_in_4bit:
            problems.append(
                f"Require cfg.load_in_4bit to be True for qlora: `load_in_4bit: {cfg.load_in_4bit}`. Write `load_in_4bit: true`, or `adapter: lora`."
            )
    if problems:
        raise ConfigError(problems)


def lora_has_no_dropout_unless_set(cfg: DictDefault) -> None:
    """`lora_dropout` is 0 unless written; LoRA on single parameters has none."""
    if cfg.adapter and cfg.lora_dropout is None:
        fill(cfg, "lora_dropout", 0.0, "no `lora_dropout` is set")
    if cfg.lora_target_parameters and cfg.lora_dropout:
        raise ConfigError(
            f"lora_dropout does not work when using lora_target_parameters: `lora_dropout: {cfg.lora_dropout}`. Write `lora_dropout: 0`."
        )


def lora_target_names_are_regular_expressions(cfg: DictDefault) -> None:
    """Each entry of `lora_target_modules` compiles as a regular expression."""
    if not isinstance(cfg.lora_target_modules, list):
        return
    broken = {}
    for name in cfg.lora_target_modules:
        try:
            re.compile(str(name))
        except re.error as err:
            broken[name] = err
    if broken:
        listed = ", ".join(f"`{name}` ({err})" for name, err in broken.items())
        raise ConfigError(
            f"`lora_target_modules`: invalid regular expression patterns: {listed}. Escape special characters with a backslash."
        )


def layers_to_transform_are_not_unfrozen_too(cfg: DictDefault) -> None:
    """Layer choices for LoRA and for full training may overlap."""
    if cfg.adapter and cfg.peft_layers_to_transform and cfg.unfrozen_parameters:
        raise ConfigError(
            "`unfrozen_parameters` used with `peft_layers_to_transform` can have unexpected behavior. Remove one."
        )


def a_layer_pattern_belongs_to_a_choice_of_layers(cfg: DictDefault) -> None:
    """`peft_layers_pattern` says in which list `peft_layers_to_transform` counts."""
    if cfg.peft_layers_pattern and not cfg.peft_layers_to_transform:
        raise ConfigError(
            "peft_layers_pattern requires peft_layers_to_transform to be set: it says where those indices count. Write them, or remove it."
        )


def adapters_work_on_the_layers_as_they_are(cfg: DictDefault) -> None:
    """Fused or ternary layers are no linear layers that LoRA could wrap."""
    if not is_lora(cfg):
        return
    if cfg.flash_attn_fuse_mlp:
        raise ConfigError("Fused modules are not supported with LoRA/QLoRA: `flash_attn_fuse_mlp: true`. Remove it.")
    if cfg.use_onebitllms:
        raise ConfigError(f"LoRA/QLoRA is not supported with use_onebitllms: `adapter: {cfg.adapter}`. Remove one.")


def zero3_recomputes_qlora_in_the_reentrant_way(cfg: DictDefault) -> None:
    """ZeRO-3 gathers quantized weights while layers run; the non-reentrant kind has been seen to fail."""
    if cfg.adapter == "qlora" and "zero3" in str(cfg.deepspeed or "") and is_reentrant(cfg) is False:
        LOG.warning("qlora + zero3 with use_reentrant: false may result in a CheckpointError about recomputed values.")


def lora_kernels_run_on_plain_lora(cfg: DictDefault) -> None:
    """The fused LoRA kernels know neither 8-bit weights, nor code from elsewhere, nor parameters that FSDP1 flattened."""
    written = [key for key in LORA_KERNELS if cfg[key]]
    if not written:
        return
    names = ", ".join(written)
    problems = []
    if cfg.adapter == "lora" and cfg.load_in_8bit:
        problems.append(
            f"{names}: lora_mlp_kernel, lora_qkv_kernel, and lora_o_kernel are not compatible with 8-bit LoRA. Remove them, or write `adapter: qlora`."
        )
    if cfg.trust_remote_code:
        problems.append(
            f"{names}: lora_mlp_kernel, lora_qkv_kernel, and lora_o_kernel are not compatible with trust_remote_code. Please disable trust_remote_code or remove them."
        )
    gpus = num_gpus(cfg)
    if fsdp_version(cfg) == 1 and gpus is not None and gpus > 1:
        problems.append(
            f"{names}: lora_mlp_kernel, lora_qkv_kernel, and lora_o_kernel are not compatible with FSDP1. Set `fsdp_version: 2`."
        )
    if problems:
        raise ConfigError(problems)


def lora_kernels_are_on_where_they_work(cfg: DictDefault) -> None:
    """Plain LoRA on one GPU, with DDP or FSDP2 uses the fused kernels unless they are written."""
    gpus = num_gpus(cfg)
    if not is_lora(cfg) or not gpus:
        return
    if cfg.rl or cfg.trust_remote_code or cfg["nvfp4_merge_aware"] or any(cfg[key] is not None for key in LORA_KERNELS):
        return
    if (cfg.adapter == "lora" and cfg.load_in_8bit) or cfg.torch_compile:
        return
    if gpus > 1 and (cfg.deepspeed or fsdp_version(cfg) == 1):
        return
    if torch_is_older_than(cfg, "2.9.0") and any(word in str(cfg.base_model).lower() for word in EXPERT_MODELS):
        return
    LOG.warning(
        "Auto-enabling LoRA kernel optimizations for faster training. Please explicitly set `lora_*_kernel` config values to `false` to disable."
    )
    for key in LORA_KERNELS:
        fill(cfg, key, True, f"`adapter: {cfg.adapter}` on {gpus} GPU(s)")


def expert_weights_are_quantized_for_adapters(cfg: DictDefault) -> None:
    """Quantizing fused experts while loading needs CUDA, an adapter, and a choice of layers that leaves the experts alone."""
    if not cfg.quantize_moe_experts:
        return
    problems = []
    if cfg.lora_target_linear:
        problems.append(
            "`lora_target_linear` is not compatible with quantize_moe_experts. Write `lora_target_modules` and `lora_target_parameters`."
        )
    if not is_lora(cfg):
        problems.append(
            f"quantize_moe_experts requires `adapter: lora` or `adapter: qlora`, but it is `{cfg.adapter}`."
        )
    if not (cfg.load_in_4bit or cfg.load_in_8bit):
        problems.append("quantize_moe_experts requires `load_in_4bit: true` or `load_in_8bit: true`.")
    if num_gpus(cfg) == 0:
        problems.append("quantize_moe_experts requires CUDA, and there is no GPU here.")
    if problems:
        raise ConfigError(problems)


def offloaded_embeddings_need_a_quantized_model_on_one_gpu(cfg: DictDefault) -> None:
    """The per-layer embedding table stays in host memory: frozen, and not sharded."""
    if not cfg.ple_cpu_offload:
        return
    problems = []
    if cfg.fsdp or cfg.fsdp_config:
        problems.append("ple_cpu_offload is not compatible with FSDP. Remove one.")
    if cfg.deepspeed:
        problems.append("ple_cpu_offload is not compatible with DeepSpeed. Remove one.")
    if not (cfg.adapter == "qlora" and cfg.load_in_4bit) and not (cfg.adapter == "lora" and cfg.load_in_8bit):
        problems.append(
            "ple_cpu_offload requires `adapter: qlora` with `load_in_4bit: true`, or `adapter: lora` with `load_in_8bit: true`."
        )
    if problems:
        raise ConfigError(problems)
    gpus = num_gpus(cfg)
    if gpus is not None and gpus > 1:
        LOG.warning("`ple_cpu_offload: true` on %s GPUs keeps one table in host memory per process.", gpus)


def fixed_tokens_train(cfg: DictDefault) -> None:
    """A token whose embedding is repaired should be trained, or it stays at the mean."""
    fixed, trained = cfg.fix_untrained_tokens, cfg.peft_trainable_token_indices
    if fixed is None or not trained:
        return
    fixed = [fixed] if isinstance(fixed, int) else fixed
    lists = trained.values() if isinstance(trained, dict) else [trained]
    missing = sorted(set(fixed) - {token for tokens in lists for token in tokens})
    if missing:
        LOG.warning(
            "`fix_untrained_tokens` has ids %s that are not in `peft_trainable_token_indices`: they keep the mean of the other tokens.",
            missing,
        )


def relora_restarts_an_adapter(cfg: DictDefault) -> None:
    """ReLoRA merges and restarts LoRA at given steps, on whole weights, with a schedule that restarts too."""
    if not cfg.relora:
        return
    problems = []
    if not cfg.jagged_restart_steps:
        problems.append(
            "jagged_restart_steps must be set to use ReLoRA: it says when to restart. Write `jagged_restart_steps: 500`."
        )
    adapters = {**OUR_ADAPTERS, **(PluginManager.get_instance().get_adapter_capabilities() if cfg.plugins else {})}
    adapter = adapters.get(cfg.adapter)
    if adapter is None or not adapter.relora:
        problems.append(f"cfg.adapter must be lora or qlora to use ReLoRA, but `adapter: {cfg.adapter}`.")
    if cfg.fsdp or cfg.fsdp_config:
        problems.append("fsdp not supported with ReLoRA. Remove one.")
    if cfg.deepspeed:
        problems.append("deepspeed not supported with ReLoRA. Remove one.")
    if cfg.lr_scheduler == "one_cycle":
        problems.append("ReLoRA is not compatible with the one_cycle scheduler. Write `lr_scheduler: cosine`.")
    if cfg.flash_attn_fuse_mlp:
        problems.append("Fused modules are not supported with ReLoRA: `flash_attn_fuse_mlp: true`. Remove it.")
    if problems:
        raise ConfigError(problems)


CHECKS = (
    adapter_is_known,
    quantized_weights_train_through_an_adapter,
    a_model_is_loaded_in_8_or_in_4_bits,
    qlora_trains_on_4_bits,
    lora_has_no_dropout_unless_set,
    lora_target_names_are_regular_expressions,
    layers_to_transform_are_not_unfrozen_too,
    a_layer_pattern_belongs_to_a_choice_of_layers,
    adapters_work_on_the_layers_as_they_are,
    zero3_recomputes_qlora_in_the_reentrant_way,
    lora_kernels_run_on_plain_lora,
    lora_kernels_are_on_where_they_work,
    expert_weights_are_quantized_for_adapters,
    offloaded_embeddings_need_a_quantized_model_on_one_gpu,
    fixed_tokens_train,
    relora_restarts_an_adapter,
)
