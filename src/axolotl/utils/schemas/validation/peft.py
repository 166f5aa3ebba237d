"""Adapters and quantized base models."""

from __future__ import annotations

import re

from axolotl.exceptions import ConfigError, did_you_mean
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
    optimizer_name,
    rl_method,
    torch_is_older_than,
)

LOG = get_logger(__name__)

OUR_ADAPTERS = {
    "lora": AdapterCapabilities("lora", relora=True),
    "qlora": AdapterCapabilities("qlora", relora=True),
    "llama-adapter": AdapterCapabilities("llama-adapter", lora_like=False),
}
LORA_STARTS = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "mica", "eva", "corda", "lora_ga")
METHODS_WITH_REFERENCE = ("dpo", "ipo", "kto", "grpo", "gdpo", "ebft")
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


def lora_patterns_are_regular_expressions(cfg: DictDefault) -> None:
    """What chooses layers by a regular expression compiles as one. Names in a list under `lora_exclude_modules` are plain."""
    excluded = cfg.lora_exclude_modules
    patterns = {
        "lora_target_modules": cfg.lora_target_modules,
        "lora_exclude_modules": excluded if isinstance(excluded, str) else None,
        "lora_rank_pattern": list(cfg.lora_rank_pattern or ()),
        "lora_alpha_pattern": list(cfg.lora_alpha_pattern or ()),
    }
    problems = []
    for key, value in patterns.items():
        broken = {}
        for name in [value] if isinstance(value, str) else value or []:
            try:
                re.compile(str(name))
            except re.error as err:
                broken[name] = err
        if broken:
            listed = ", ".join(f"`{name}` ({err})" for name, err in broken.items())
            problems.append(
                f"`{key}`: invalid regular expression patterns: {listed}. Escape special characters with a backslash."
            )
    if problems:
        raise ConfigError(problems)


def layers_to_transform_are_not_unfrozen_too(cfg: DictDefault) -> None:
    """Layer choices for LoRA and for full training may overlap."""
    if cfg.adapter and cfg.peft_layers_to_transform is not None and cfg.unfrozen_parameters:
        raise ConfigError(
            "`unfrozen_parameters` used with `peft_layers_to_transform` can have unexpected behavior. Remove one."
        )


def an_adapter_leaves_the_base_frozen(cfg: DictDefault) -> None:
    """`unfrozen_parameters` chooses among all weights, of which an adapter freezes every one."""
    if cfg.adapter and cfg.unfrozen_parameters:
        LOG.warning(
            "`unfrozen_parameters` has no effect with `adapter: %s`, which freezes the base model. Layers named under "
            "`lora_modules_to_save` are trained in full beside it.",
            cfg.adapter,
        )
        fill(cfg, "unfrozen_parameters", None, f"`adapter: {cfg.adapter}` freezes the base model")


def an_adapter_needs_its_base_later(cfg: DictDefault) -> None:
    """The random weights of `reinit_weights` are saved nowhere, and an adapter is nothing without its base."""
    if cfg.adapter and cfg.reinit_weights:
        LOG.warning(
            "`reinit_weights: true` with `adapter: %s`: the random base model is not saved, so that the adapter cannot be used "
            "after this run.",
            cfg.adapter,
        )


def lora_starts_in_a_known_way(cfg: DictDefault) -> None:
    """`peft_init_lora_weights` is true, false or one of the names that peft documents."""
    init = cfg.peft_init_lora_weights
    if not isinstance(init, str):
        return
    name = init.strip().lower()
    if name in ("true", "false"):
        cfg.peft_init_lora_weights = name == "true"
        return
    if name not in LORA_STARTS and not re.fullmatch(r"pissa_niter_\d+", name):
        hint = did_you_mean(name, LORA_STARTS)
        raise ConfigError(
            f"`peft_init_lora_weights: {init}` is not known.{hint} Write true, false, {', '.join(LORA_STARTS)} or `pissa_niter_4`."
        )
    cfg.peft_init_lora_weights = name
    ranks = [cfg.lora_r or 8, *(cfg.lora_rank_pattern or {}).values()]
    if name == "orthogonal" and any(rank % 2 for rank in ranks):
        raise ConfigError(
            f"`peft_init_lora_weights: orthogonal` needs even ranks, but they are {', '.join(map(str, ranks))}. Change `lora_r`."
        )


def a_start_that_changes_the_base_finds_whole_weights(cfg: DictDefault) -> None:
    """PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change base weights, which must be there unquantized, unsharded, and stay."""
    init = str(cfg.peft_init_lora_weights)
    loftq = cfg.peft.loftq_config if isinstance(cfg.peft, dict) else None
    if loftq and init not in ("None", "True", "loftq"):
        raise ConfigError(
            f"`peft: {{loftq_config: ...}}` and `peft_init_lora_weights: {init}` are two starts of LoRA. Remove one."
        )
    is_loftq = bool(loftq) or init == "loftq"
    if not is_lora(cfg) or not (is_loftq or init in ("olora", "corda", "lora_ga") or init.startswith("pissa")):
        return
    written = "`peft: {loftq_config: ...}`" if loftq else f"`peft_init_lora_weights: {init}`"
    problems = []
    if loftq and loftq.loftq_bits not in (None, 4, 8):
        problems.append(f"`loftq_bits: {loftq.loftq_bits}` is not 4 or 8. Write one of them.")
    quantized = [key for key in ("load_in_4bit", "load_in_8bit", "gptq", "model_quantization_config") if cfg[key]]
    if quantized and not (cfg.merge_lora or cfg.lora_model_dir):
        how = "rounds the weights by itself" if is_loftq else "decomposes the unquantized weights"
        problems.append(
            f"{written} {how}, but `{quantized[0]}: {cfg[quantized[0]]}` is set. Write `adapter: lora` without it."
        )
    if cfg.lora_target_parameters:
        problems.append(f"{written} starts layers, not parameters. Remove it, or `lora_target_parameters`.")
    if cfg.relora:
        problems.append(f"{written} cannot be repeated at a restart of `relora: true`. Remove one.")
    if cfg.peft_layer_replication:
        problems.append(f"{written} would change a layer once per copy of `peft_layer_replication`. Remove one.")
    if fsdp_version(cfg) or "zero3" in str(cfg.deepspeed or ""):
        problems.append(f"{written} needs whole weights on each GPU: use DDP or DeepSpeed ZeRO 1 or 2.")
    if not is_loftq and rl_method(cfg) in METHODS_WITH_REFERENCE:
        problems.append(
            f"{written} changes the base model, which is the reference of `rl: {rl_method(cfg)}`. Use another start."
        )
    if problems:
        raise ConfigError(problems)


def a_start_from_data_finds_rows(cfg: DictDefault) -> None:
    """EVA, CorDA and LoRA-GA run prepared rows through the whole model before training."""
    init = cfg.peft_init_lora_weights
    if not is_lora(cfg) or init not in ("eva", "corda", "lora_ga"):
        return
    written = f"`peft_init_lora_weights: {init}`"
    problems = []
    rows = ("rl", "reward_model", "process_reward_model", "streaming", "pretraining_dataset")
    other = next((key for key in rows if cfg[key]), None)
    if other:
        problems.append(
            f"{written} starts from prepared rows of supervised tokens, which `{other}: {cfg[other]}` has not. Use `pissa`."
        )
    if init == "eva" and (fsdp_version(cfg) or "zero3" in str(cfg.deepspeed or "")):
        problems.append(f"{written} needs the whole model on each GPU: use DDP or DeepSpeed ZeRO 1 or 2.")
    if init == "eva" and cfg.relora:
        problems.append(f"{written} cannot be repeated at a restart of `relora: true`. Remove one.")
    if init == "eva" and cfg.peft_layer_replication:
        problems.append(f"{written} gives ranks by layer, and `peft_layer_replication` copies layers. Remove one.")
    if problems:
        raise ConfigError(problems)


def a_llama_adapter_sits_on_whole_weights(cfg: DictDefault) -> None:
    """LLaMA-Adapter computes attention beside that of the model, in the model's number format."""
    if cfg.peft_adapter and cfg.adapter != "llama-adapter":
        raise ConfigError(
            f"`peft_adapter` is the size of `adapter: llama-adapter`, but `adapter: {cfg.adapter}` is set. Remove one."
        )
    quantized = next((key for key in ("load_in_4bit", "load_in_8bit", "gptq") if cfg[key]), None)
    if cfg.adapter == "llama-adapter" and quantized:
        raise ConfigError(
            f"`adapter: llama-adapter` needs an unquantized model, but `{quantized}: true` is set. Remove it, or write `adapter: qlora`."
        )


def lisa_says_how_many_and_how_often(cfg: DictDefault) -> None:
    """LISA needs both of its numbers, and optimizers that may forget a layer."""
    layers, interval = cfg.lisa_n_layers, cfg.lisa_step_interval
    if not layers and not interval:
        return
    problems = []
    if not (layers and interval):
        missing = "lisa_step_interval: 20" if layers else "lisa_n_layers: 4"
        problems.append(f"LISA needs both `lisa_n_layers` and `lisa_step_interval`. Write `{missing}` too.")
    if cfg.deepspeed or fsdp_version(cfg):
        problems.append("LISA changes which layers train, which DeepSpeed and FSDP fix at the start. Use DDP.")
    if problems:
        raise ConfigError(problems)
    if cfg.ddp_find_unused_parameters is None:
        fill(cfg, "ddp_find_unused_parameters", True, "with LISA, the frozen layers have no gradients to wait for")


def a_layer_pattern_belongs_to_a_choice_of_layers(cfg: DictDefault) -> None:
    """`peft_layers_pattern` says in which list `peft_layers_to_transform` counts."""
    if cfg.peft_layers_pattern and cfg.peft_layers_to_transform is None:
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
    if cfg.adapter == "lora" and cfg.load_in_8bit:
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
    if optimizer_name(cfg).startswith("schedule_free"):
        problems.append(
            f"`optimizer: {cfg.optimizer}` averages weights over the whole run, which ReLoRA restarts. Write `optimizer: adamw_torch_fused`."
        )
    if cfg.reinit_weights:
        problems.append(
            "`reinit_weights: true` starts from weights that no file has, and ReLoRA merges into those of `base_model`."
        )
    for key in ("load_best_model_at_end", "early_stopping_patience"):
        if cfg[key]:
            problems.append(
                f"`{key}: {cfg[key]}` would put an adapter back on a base model that ReLoRA has changed since. Remove it."
            )
    for key in ("peft_layer_replication", "peft_trainable_token_indices"):
        if cfg[key]:
            problems.append(f"`{key}` is not supported with ReLoRA. Remove one.")
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
    lora_patterns_are_regular_expressions,
    layers_to_transform_are_not_unfrozen_too,
    an_adapter_leaves_the_base_frozen,
    an_adapter_needs_its_base_later,
    lora_starts_in_a_known_way,
    a_start_that_changes_the_base_finds_whole_weights,
    a_start_from_data_finds_rows,
    a_llama_adapter_sits_on_whole_weights,
    lisa_says_how_many_and_how_often,
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
