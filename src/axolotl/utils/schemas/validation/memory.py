"""Number formats, checkpointing, offloading, quantization-aware training."""

from __future__ import annotations

import importlib.util

from axolotl.exceptions import ConfigError, MissingExtraError
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.validation.common import (
    capability,
    fill,
    fsdp_option,
    fsdp_version,
    is_reentrant,
    knows_document_borders,
    torch_is_older_than,
)

LOG = get_logger(__name__)

# Operations that adapters change: their saved results would be those of the frozen weights alone.
MATMUL_OPS = frozenset({"matmul", "mm", "addmm", "bmm", "linear", "all_matmuls"})
SELECTIVE_DEFAULT = {"save": ["attention"], "save_sliding_window": False, "offload": False}


def bf16_needs_a_gpu_that_has_it(cfg: DictDefault) -> None:
    """bf16 that was asked for by name and is not there is slow or fails."""
    if (cfg.bf16 in (True, "full") or cfg.bfloat16) and capability(cfg, "bf16") is False:
        LOG.warning(
            "bf16 requested, but AMP is not supported on this GPU. Requires Ampere series or above. Write `bf16: auto`."
        )


def fp8_needs_a_gpu_that_has_it(cfg: DictDefault) -> None:
    """float8 matrix products need Ada, Hopper or newer, and torchao."""
    if cfg.fp8 and capability(cfg, "fp8") is False:
        raise ConfigError(
            "`fp8: true`: fp8 requested, but fp8 is not supported on this GPU (it needs sm_89 or newer). Write `bf16: auto`."
        )
    if cfg.fp8 and importlib.util.find_spec("torchao") is None:
        raise MissingExtraError("torchao", "torchao", "`fp8: true`")


def fp8_pays_off_when_compiled(cfg: DictDefault) -> None:
    """The casts of float8 cost more than they save unless the compiler fuses them."""
    if not cfg.fp8:
        return
    if not cfg.torch_compile:
        LOG.warning(
            "`fp8: true` without `torch_compile: true` is likely to be slower than bf16. Write `torch_compile: true`."
        )
    if fsdp_option(cfg, "activation_checkpointing"):
        LOG.warning(
            "`fp8: true` with `fsdp_config: {activation_checkpointing: true}` may be slower than bf16. Write `activation_checkpointing: false`."
        )


def fp8_options_need_fp8(cfg: DictDefault) -> None:
    """A float8 recipe needs `fp8`; sending float8 weights between GPUs needs FSDP2 and one scale per tensor."""
    if cfg.fp8_config and not cfg.fp8:
        raise ConfigError("`fp8_config` requires `fp8: true`. Add it, or remove `fp8_config`.")
    if not cfg.fp8_enable_fsdp_float8_all_gather:
        return
    recipe = (cfg.fp8_config or DictDefault()).recipe or "tensorwise"
    if recipe != "tensorwise":
        raise ConfigError(
            f"`fp8_enable_fsdp_float8_all_gather: true` requires `fp8_config: {{recipe: tensorwise}}`, but the recipe is `{recipe}`. Remove one."
        )
    if fsdp_version(cfg) != 2:
        raise ConfigError(
            "`fp8_enable_fsdp_float8_all_gather: true` requires FSDP2. Write `fsdp_version: 2` and `fsdp_config:`, or remove it."
        )


def tf32_auto_follows_the_gpu(cfg: DictDefault) -> None:
    """`tf32: auto`, the default, is true where the GPU has TF32."""
    if cfg.tf32 in (None, "auto") and capability(cfg, "tf32") is not None:
        has = bool(capability(cfg, "tf32"))
        fill(cfg, "tf32", has, "the GPU has TF32" if has else "no GPU with TF32")


def fp16_full_training_packs_with_flash_attention(cfg: DictDefault) -> None:
    """Full fine-tuning in fp16 on packed rows has been seen to overflow with masks."""
    if cfg.fp16 and not cfg.adapter and cfg.sample_packing and not knows_document_borders(cfg.attn_implementation):
        LOG.warning(
            "Full fine tune w/o FA2 w/ sample packing and fp16/float16 is likely to raise errors. Try LoRA, or `flash_attention: true`."
        )


def frozen_embeddings_break_reentrant_checkpointing(cfg: DictDefault) -> None:
    """Reentrant checkpointing finds no gradient through inputs that are frozen."""
    if cfg.unfrozen_parameters and is_reentrant(cfg) is True:
        raise ConfigError(
            "`unfrozen_parameters` is not supported with `gradient_checkpointing_kwargs: {use_reentrant: true}`: no gradient would reach the "
            "unfrozen layers. Write `use_reentrant: false`."
        )


def offloading_is_a_key_of_its_own(cfg: DictDefault) -> None:
    """`gradient_checkpointing: offload` is `true` with `activation_offloading`."""
    modes = {"offload": True, "offload_disk": "disk"}
    if cfg.gradient_checkpointing in modes:
        written = cfg.gradient_checkpointing
        LOG.warning(
            "`gradient_checkpointing: %s` is deprecated. Write `gradient_checkpointing: true` and `activation_offloading: %s`.",
            written,
            str(modes[written]).lower(),
        )
        fill(cfg, "activation_offloading", modes[written], f"`gradient_checkpointing: {written}`")
        fill(cfg, "gradient_checkpointing", True, f"`gradient_checkpointing: {written}`")


def only_checkpoints_are_offloaded(cfg: DictDefault) -> None:
    """Activations that are kept anyway are not moved away."""
    if cfg.activation_offloading and not cfg.gradient_checkpointing:
        raise ConfigError(
            f"activation_offloading requires gradient_checkpointing: `activation_offloading: {cfg.activation_offloading}`. Write `gradient_checkpointing: true`."
        )


def offloaded_hidden_states_use_plain_checkpointing(cfg: DictDefault) -> None:
    """`activation_offloading: hidden_states` moves the inputs of checkpointed layers; the non-reentrant kind is the default."""
    if cfg.activation_offloading != "hidden_states":
        return
    kwargs = cfg.gradient_checkpointing_kwargs or DictDefault()
    if kwargs.use_reentrant and cfg.unfrozen_parameters:
        raise ConfigError(
            "`activation_offloading: hidden_states` with `use_reentrant: true` is not supported with `unfrozen_parameters`. Write `use_reentrant: false`."
        )
    if kwargs.use_reentrant is None:
        kwargs.use_reentrant = False
        cfg["gradient_checkpointing_kwargs"] = kwargs
        note_choice(cfg, "gradient_checkpointing_kwargs.use_reentrant", False, "`activation_offloading: hidden_states`")
    if cfg.adapter:
        LOG.warning(
            "`activation_offloading: hidden_states` with an adapter saves little memory: the frozen layers keep few activations."
        )


def selective_checkpointing_refines_checkpointing(cfg: DictDefault) -> None:
    """Selective checkpointing chooses what a checkpointed layer keeps. It needs the non-reentrant kind and nothing that moves activations."""
    if not cfg.selective_checkpointing:
        return
    if cfg.selective_checkpointing is True:
        fill(
            cfg,
            "selective_checkpointing",
            dict(SELECTIVE_DEFAULT),
            "`selective_checkpointing: true` keeps the results of attention",
        )
    problems = []
    if not cfg.gradient_checkpointing:
        problems.append(
            "selective_checkpointing requires gradient_checkpointing. Write `gradient_checkpointing: true`."
        )
    if is_reentrant(cfg):
        problems.append(
            "selective_checkpointing requires `use_reentrant: false` under `gradient_checkpointing_kwargs`."
        )
    if cfg.activation_offloading and cfg.activation_offloading != "hidden_states":
        problems.append(
            f"selective_checkpointing cannot be combined with `activation_offloading: {cfg.activation_offloading}`. Write "
            "`activation_offloading: hidden_states`, or remove one."
        )
    saved = MATMUL_OPS.intersection(cfg.selective_checkpointing.save or [])
    if cfg.adapter and saved:
        problems.append(
            f"selective_checkpointing with an adapter cannot save matmul results ({', '.join(sorted(saved))}): the adapter changes them. Write "
            "`save: [attention]`."
        )
    if problems:
        raise ConfigError(problems)
    if cfg.torch_compile:
        LOG.warning(
            "`selective_checkpointing` with `torch_compile: true`: the compiler chooses for itself what to keep."
        )


def rounding_is_simulated_on_full_weights(cfg: DictDefault) -> None:
    """Quantization-aware training rounds the weights that train; adapters and quantized bases have none of those."""
    if not cfg.qat:
        return
    problems = []
    if cfg.adapter or cfg.peft:
        problems.append(
            f"QAT and PEFT cannot be used together: `qat` with `{'adapter' if cfg.adapter else 'peft'}`. Remove one."
        )
    for key in ("load_in_8bit", "load_in_4bit"):
        if cfg[key]:
            problems.append(f"QAT and {key} cannot be used together: `qat` with `{key}: true`. Remove one.")
    if cfg.qat.weight_dtype == "ternary" and cfg.qat.activation_dtype not in (None, "int8"):
        problems.append(
            f"`qat: {{weight_dtype: ternary}}` requires `activation_dtype: int8`, but it is `{cfg.qat.activation_dtype}`."
        )
    if torch_is_older_than(cfg, "2.6.0"):
        problems.append("QAT is not supported on torch version < 2.6.0. Update torch.")
    if problems:
        raise ConfigError(problems)


CHECKS = (
    bf16_needs_a_gpu_that_has_it,
    fp8_needs_a_gpu_that_has_it,
    fp8_pays_off_when_compiled,
    fp8_options_need_fp8,
    tf32_auto_follows_the_gpu,
    fp16_full_training_packs_with_flash_attention,
    frozen_embeddings_break_reentrant_checkpointing,
    offloading_is_a_key_of_its_own,
    only_checkpoints_are_offloaded,
    offloaded_hidden_states_use_plain_checkpointing,
    selective_checkpointing_refines_checkpointing,
    rounding_is_simulated_on_full_weights,
)
