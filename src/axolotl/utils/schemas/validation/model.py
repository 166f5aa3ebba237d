"""The model: where its code comes from, how it is quantized, how it is compiled."""

from __future__ import annotations

import re

from axolotl.exceptions import ConfigError
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.validation.common import fill, num_gpus, torch_is_older_than

LOG = get_logger(__name__)

COMPILE_OPTIONS = frozenset(
    {
        "coordinate_descent_tuning",
        "coordinate_descent_check_all_directions",
        "shape_padding",
        "epilogue_fusion",
        "max_autotune_gemm",
        "fx_graph_cache",
        "assume_aligned_inputs",
        "comprehensive_padding",
        "decompose_mem_bound_mm",
        "triton.cudagraphs",
    }
)
RESIZE_ALGORITHMS = ("bilinear", "bicubic", "lanczos")


def remote_code_is_worth_a_look(cfg: DictDefault) -> None:
    """Code that comes with a model runs with the user's rights."""
    if cfg.trust_remote_code:
        LOG.warning("`trust_remote_code` is set to true. Please make sure that you reviewed the remote code/model.")


def processor_arguments_leave_trust_and_revision_to_their_keys(cfg: DictDefault) -> None:
    """`revision` and `trust_remote_code` have top-level keys, which hold for model, tokenizer and processor alike."""
    hidden = [name for name in ("revision", "trust_remote_code") if name in (cfg.processor_kwargs or {})]
    if hidden:
        keys = {"revision": "revision_of_model", "trust_remote_code": "trust_remote_code"}
        raise ConfigError(
            f"`processor_kwargs` must not contain {', '.join(f'`{name}`' for name in hidden)}. Write "
            + ", ".join(f"`{keys[name]}: {cfg.processor_kwargs[name]}`" for name in hidden)
            + " at the top level instead."
        )


def images_are_resized_by_a_known_algorithm(cfg: DictDefault) -> None:
    """`image_resize_algorithm` is bilinear, bicubic or lanczos."""
    value = cfg.image_resize_algorithm
    if isinstance(value, str) and value.lower() not in RESIZE_ALGORITHMS:
        raise ConfigError(f"`image_resize_algorithm: {value}` must be one of {', '.join(RESIZE_ALGORITHMS)}.")


def compile_auto_follows_the_torch_version(cfg: DictDefault) -> None:
    """`torch_compile: auto` compiles from torch 2.5.1 on, where there is a GPU: on a CPU compiling takes longer than it saves."""
    if cfg.torch_compile == "auto" and num_gpus(cfg) == 0:
        fill(cfg, "torch_compile", False, "no GPU")
    if cfg.torch_compile == "auto":
        old = torch_is_older_than(cfg, "2.5.1")
        fill(cfg, "torch_compile", not old, "torch is older than 2.5.1" if old else "torch is 2.5.1 or newer")
        if old and cfg.torch_compile_options:
            LOG.warning("`torch_compile_options` are dropped: `torch_compile: auto` does not compile on this torch.")
            del cfg["torch_compile_options"]


def compile_options_are_known_and_used(cfg: DictDefault) -> None:
    """Only options that keep training right are passed to the compiler, and only when it runs."""
    if not cfg.torch_compile_options:
        return
    unknown = sorted(set(map(str, cfg.torch_compile_options)) - COMPILE_OPTIONS)
    if unknown:
        raise ConfigError(
            f"`torch_compile_options` has unsupported keys: {', '.join(unknown)}. Allowed: {', '.join(sorted(COMPILE_OPTIONS))}."
        )
    if not cfg.torch_compile:
        raise ConfigError("`torch_compile_options` requires `torch_compile: true`. Add it, or remove the options.")
    if cfg.torch_compile_options["triton.cudagraphs"] and cfg.sample_packing:
        LOG.warning(
            "`torch_compile_options: {triton.cudagraphs: true}` with `sample_packing: true`: packed rows change shapes, and each is recorded anew."
        )


def torch_is_recent(cfg: DictDefault) -> None:
    """Older releases of torch are no longer looked after."""
    if torch_is_older_than(cfg, "2.6.0"):
        LOG.warning("torch version %s is no longer supported. Update torch.", cfg.env_capabilities.torch_version)


def memory_limits_are_given_once(cfg: DictDefault) -> None:
    """`gpu_memory_limit` is short for `max_memory`."""
    if cfg.max_memory is not None and cfg.gpu_memory_limit is not None:
        raise ConfigError(
            f"max_memory and gpu_memory_limit are mutually exclusive and cannot be used together: `max_memory: {dict(cfg.max_memory)}`, "
            f"`gpu_memory_limit: {cfg.gpu_memory_limit}`. Remove one."
        )


def memory_is_written_as_a_size(cfg: DictDefault) -> None:
    """A number of bytes or a text such as `20GiB`; `gpu_memory_limit` counts in gigabytes."""
    sizes = {f"max_memory: {{{device}: ...}}": size for device, size in (cfg.max_memory or {}).items()}
    sizes["gpu_memory_limit"] = cfg.gpu_memory_limit
    for key, size in sizes.items():
        if isinstance(size, str) and not re.fullmatch(r"\d+(\.\d+)?\s*([KMGTP]i?B)?", size.strip(), re.IGNORECASE):
            raise ConfigError(f"`{key}` is {size!r}, which is no size. Write a number, or a text such as `20GiB`.")


def a_model_is_quantized_once(cfg: DictDefault) -> None:
    """A model that comes quantized is not quantized again by bitsandbytes."""
    if cfg.model_quantization_config and (cfg.load_in_8bit or cfg.load_in_4bit):
        raise ConfigError(
            f"model_quantization_config cannot be used together with load_in_8bit or load_in_4bit: `model_quantization_config: "
            f"{cfg.model_quantization_config}` says that the model comes quantized. Remove one."
        )


def one_fused_loss_replaces_the_loss(cfg: DictDefault) -> None:
    """At most one of the fused cross-entropies."""
    keys = ("cut_cross_entropy", "chunked_cross_entropy", "liger_cross_entropy", "liger_fused_linear_cross_entropy")
    written = [key for key in keys if cfg[key]]
    if len(written) > 1:
        raise ConfigError(
            f"Only one of {', '.join(keys)} can be enabled, but {' and '.join(f'`{key}: true`' for key in written)} are set: each replaces "
            "the loss. Keep one."
        )


def mpt_has_no_checkpointing(cfg: DictDefault) -> None:
    """MPT's code does not support gradient checkpointing."""
    # A word of its own: `prompt` contains the letters too.
    if cfg.gradient_checkpointing and re.search(r"(?<![a-z])mpt(?![a-z])", str(cfg.base_model or "").lower()):
        raise ConfigError(
            f"gradient_checkpointing is not supported for MPT models: `base_model: {cfg.base_model}`. Remove `gradient_checkpointing`."
        )


def falcon_is_not_sharded_by_fsdp_lists(cfg: DictDefault) -> None:
    """Falcon does not work with the older `fsdp` list."""
    if cfg.base_model and "falcon" in str(cfg.base_model).lower() and cfg.fsdp:
        raise ConfigError(
            f"FSDP is not supported for falcon models: `base_model: {cfg.base_model}` with `fsdp`. Remove `fsdp`."
        )


def better_transformer_runs_in_plain_half_precision(cfg: DictDefault) -> None:
    """BetterTransformer takes neither mixed precision nor, probably, adapters."""
    if not cfg.flash_optimum:
        return
    if cfg.adapter:
        LOG.warning("BetterTransformers probably doesn't work with PEFT adapters")
    if cfg.fp16 or cfg.bf16:
        raise ConfigError(
            "AMP is not supported with BetterTransformer: `flash_optimum: true` with `fp16` or `bf16`. Write `bfloat16: true` or `float16: true` "
            "instead."
        )
    if not (cfg.float16 or cfg.bfloat16):
        LOG.warning(
            "You should probably set bfloat16 or float16 to true to load the model in float16 for BetterTransformers"
        )


def gptq_models_have_no_revision(cfg: DictDefault) -> None:
    """A GPTQ model is loaded from its main branch."""
    if cfg.gptq and cfg.revision_of_model:
        raise ConfigError(
            f"revision_of_model is not supported for GPTQ models: `revision_of_model: {cfg.revision_of_model}`. Download the revision and write "
            "its folder as `base_model`."
        )


CHECKS = (
    remote_code_is_worth_a_look,
    processor_arguments_leave_trust_and_revision_to_their_keys,
    images_are_resized_by_a_known_algorithm,
    compile_auto_follows_the_torch_version,
    compile_options_are_known_and_used,
    torch_is_recent,
    memory_limits_are_given_once,
    memory_is_written_as_a_size,
    a_model_is_quantized_once,
    one_fused_loss_replaces_the_loss,
    mpt_has_no_checkpointing,
    falcon_is_not_sharded_by_fsdp_lists,
    better_transformer_runs_in_plain_half_precision,
    gptq_models_have_no_revision,
)
