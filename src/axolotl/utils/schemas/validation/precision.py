"""Number formats: what the weights are kept in, what is computed in, and which of these go together."""

from __future__ import annotations

from axolotl.exceptions import ConfigError
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.validation.common import (
    capability,
    fill,
    fsdp_option,
    fsdp_version,
    knows_document_borders,
)

LOG = get_logger(__name__)

# Keys that say in which format the weights are kept, without mixed precision.
WEIGHT_FORMATS = ("bfloat16", "float16", "float32")


def weights_have_one_format(cfg: DictDefault) -> None:
    """At most one of `bfloat16`, `float16` and `float32`; and what is computed in a half type agrees with it."""
    written = [key for key in WEIGHT_FORMATS if cfg[key]]
    if len(written) > 1:
        raise ConfigError(
            f"{' and '.join(f'`{key}: true`' for key in written)} cannot be combined: each says in which format the weights are "
            "kept. Keep one."
        )
    computes_in_bf16 = cfg.bf16 in (True, "full")
    clashes = [
        (cfg.bfloat16 and cfg.fp16, "`bfloat16: true` and `fp16: true`", "`bf16: true`"),
        (cfg.float16 and computes_in_bf16, f"`float16: true` and `bf16: {str(cfg.bf16).lower()}`", "`fp16: true`"),
    ]
    for clash, written_together, instead in clashes:
        if clash:
            raise ConfigError(
                f"{written_together} cannot be combined: the weights would be kept in one half type and computed in the other. Write "
                f"{instead} alone."
            )


def computing_has_one_format(cfg: DictDefault) -> None:
    """Of `bf16` and `fp16`, bf16 wins: it needs no loss scaling."""
    if cfg.fp16 and cfg.bf16 in (True, "full"):
        LOG.warning("`bf16: %s` and `fp16: true` are both set; bf16 wins.", str(cfg.bf16).lower())
        fill(cfg, "fp16", False, f"`bf16: {str(cfg.bf16).lower()}` is set too, and needs no loss scaling")


def float32_computes_in_float32(cfg: DictDefault) -> None:
    """`float32: true` leaves `bf16: auto`, the default, nothing to choose."""
    if cfg.float32 and cfg.bf16 in (None, "auto") and not cfg.fp16:
        fill(cfg, "bf16", False, "`float32: true`")


def float16_weights_train_without_loss_scaling(cfg: DictDefault) -> None:
    """Weights in float16 that train themselves lose small gradients, which nothing scales up."""
    if cfg.float16 and not cfg.adapter:
        LOG.warning(
            "`float16: true` trains weights in float16 without loss scaling: gradients below 6e-8 are lost. Write `fp16: true` (float32 "
            "weights, scaled loss) or `bf16: true`."
        )


def fp16_scales_float32_weights(cfg: DictDefault) -> None:
    """Loss scaling needs float32 weights where weights train; an adapter is kept in float32 for it."""
    if cfg.fp16 and cfg.adapter and cfg.peft_autocast_adapter_dtype is False:
        raise ConfigError(
            "`fp16: true` with `peft_autocast_adapter_dtype: false` would keep the adapter in float16, whose gradients cannot be "
            "unscaled. Remove `peft_autocast_adapter_dtype`, or write `bf16: true`."
        )


def bf16_needs_a_gpu_that_has_it(cfg: DictDefault) -> None:
    """bf16 that was asked for by name and is not there is slow or fails."""
    if (cfg.bf16 in (True, "full") or cfg.bfloat16) and capability(cfg, "bf16") is False:
        LOG.warning(
            "bf16 requested, but AMP is not supported on this GPU. Requires Ampere series or above. Write `bf16: auto`."
        )


def fp8_needs_a_gpu_that_has_it(cfg: DictDefault) -> None:
    """float8 matrix products need Ada, Hopper or newer, weights that are not quantized otherwise, and bf16 around them."""
    if cfg.fp8 and capability(cfg, "fp8") is False:
        raise ConfigError(
            "`fp8: true`: fp8 requested, but fp8 is not supported on this GPU (it needs sm_89 or newer). Write `bf16: auto`."
        )
    if cfg.fp8 and (cfg.adapter not in (None, "lora") or cfg.load_in_8bit or cfg.load_in_4bit):
        other = next((key for key in ("load_in_4bit", "load_in_8bit") if cfg[key]), "adapter")
        raise ConfigError(
            f"`fp8: true` trains all weights, or `adapter: lora` over a base in fp8, and cannot be combined with `{other}: "
            f"{str(cfg[other]).lower()}`. Remove one."
        )
    if cfg.fp8 and (cfg.fp16 or cfg.bf16 is False):
        raise ConfigError("`fp8: true` multiplies into bf16. Write `bf16: auto`.")


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


def fp8_below_an_adapter_has_one_recipe(cfg: DictDefault) -> None:
    """`fp8_config` is about weights that train; those below an adapter have one scale per row."""
    options = cfg.fp8_config
    if options is not None and cfg.adapter and (options.recipe != "rowwise" or options.filter_fqns):
        raise ConfigError(
            f"`fp8_config` says how all weights train in fp8. Below `adapter: {cfg.adapter}` they are frozen, and quantized once with one "
            "scale per row. Remove `fp8_config`."
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


CHECKS = (
    weights_have_one_format,
    computing_has_one_format,
    float32_computes_in_float32,
    float16_weights_train_without_loss_scaling,
    fp16_scales_float32_weights,
    bf16_needs_a_gpu_that_has_it,
    fp8_needs_a_gpu_that_has_it,
    fp8_pays_off_when_compiled,
    fp8_options_need_fp8,
    fp8_below_an_adapter_has_one_recipe,
    tf32_auto_follows_the_gpu,
    fp16_full_training_packs_with_flash_attention,
)
