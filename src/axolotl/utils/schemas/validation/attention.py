"""Attention: one switch, `attn_implementation`, and what works with which backend."""

from __future__ import annotations

from axolotl.exceptions import ConfigError
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.validation.common import (
    MASK_BACKENDS,
    VARLEN_BACKENDS,
    compute_capability,
    fill,
    hub_kernel,
    knows_document_borders,
    torch_is_older_than,
)

LOG = get_logger(__name__)

# Older switches, in the order in which they win when several are true.
OLD_SWITCHES = {
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}
SHORT_NAMES = {"flash": "flash_attention_2", "flex": "flex_attention", "sdp": "sdpa"}
CANONICAL_NAMES = (VARLEN_BACKENDS | MASK_BACKENDS | {"fp8"}) - {name for name in VARLEN_BACKENDS if "/" in name}


def attn_implementation_is_a_canonical_name_or_a_hub_kernel(cfg: DictDefault) -> None:
    """`attn_implementation` is a known backend by its full name, or a kernel on the hub as `org/name[@revision][:function]`."""
    value = cfg.attn_implementation
    if value is None:
        return
    if not isinstance(value, str):
        raise ConfigError(f"`attn_implementation: {value}` must be a string, such as `flash_attention_2` or `sdpa`.")
    if value in SHORT_NAMES:
        raise ConfigError(
            f"`attn_implementation: {value}` is not accepted because it is short for a name. Use the canonical name: `attn_implementation: {SHORT_NAMES[value]}`."
        )
    if value not in CANONICAL_NAMES and "/" not in value:
        known = ", ".join(sorted(CANONICAL_NAMES))
        raise ConfigError(
            f"`attn_implementation: {value}` is not a known attention. Write one of {known}, or a hub kernel as `org/name`."
        )


def one_switch_chooses_the_attention(cfg: DictDefault) -> None:
    """The older switches are resolved into `attn_implementation`; both at once is a contradiction. A false switch means nothing."""
    written = [switch for switch in OLD_SWITCHES if cfg[switch]]
    if written and cfg.attn_implementation:
        raise ConfigError(
            f"`{written[0]}: true` and `attn_implementation: {cfg.attn_implementation}` cannot be combined: both choose the "
            f"attention. Keep `attn_implementation` and remove {', '.join(f'`{switch}`' for switch in written)}."
        )
    if len(written) > 1:
        LOG.warning("%s are all set; `%s` wins.", ", ".join(f"`{switch}: true`" for switch in written), written[0])
    if written:
        fill(cfg, "attn_implementation", OLD_SWITCHES[written[0]], f"`{written[0]}: true`")
    for switch in OLD_SWITCHES:
        cfg.pop(switch, None)


def flash_attn_d512_is_now_large_head_attention(cfg: DictDefault) -> None:
    """The older `flash_attn_d512` is `large_head_attention: triton_flash`."""
    if cfg.flash_attn_d512:
        if cfg.large_head_attention not in (None, "triton_flash"):
            raise ConfigError(
                f"`flash_attn_d512: true` means `large_head_attention: triton_flash`, but `large_head_attention: "
                f"{cfg.large_head_attention}` is set. Remove `flash_attn_d512`."
            )
        fill(cfg, "large_head_attention", "triton_flash", "`flash_attn_d512: true` is its older name")
    cfg.pop("flash_attn_d512", None)


def gemma4_hybrid_attention_builds_on_flash_attention_2(cfg: DictDefault) -> None:
    """The hybrid uses flash attention on sliding layers and SDPA on the others; the base must be flash_attention_2."""
    if not cfg.gemma4_hybrid_attn_impl:
        return
    if cfg.attn_implementation is None:
        fill(cfg, "attn_implementation", "flash_attention_2", "`gemma4_hybrid_attn_impl: true` builds on it")
    elif cfg.attn_implementation != "flash_attention_2":
        raise ConfigError(
            f"`gemma4_hybrid_attn_impl: true` requires `attn_implementation: flash_attention_2`, but it is "
            f"`{cfg.attn_implementation}`. Remove one of them."
        )


def packing_chooses_an_attention_that_knows_borders(cfg: DictDefault) -> None:
    """With packing and no attention chosen, the attention is the best one that keeps documents apart by their lengths."""
    if cfg.sample_packing and not cfg.attn_implementation:
        fill(
            cfg,
            "attn_implementation",
            "flash_attention_2",
            "`sample_packing: true` needs an attention that keeps packed documents apart; it runs on the best kernel present",
        )


def packing_needs_an_attention_that_keeps_documents_apart(cfg: DictDefault) -> None:
    """An attention that neither knows lengths nor takes a mask may let packed documents see each other."""
    backend = cfg.attn_implementation
    if backend not in CANONICAL_NAMES and "/" not in (backend or ""):
        return
    if cfg.sample_packing and not knows_document_borders(backend) and backend not in MASK_BACKENDS:
        LOG.warning(
            "`sample_packing: true` with `attn_implementation: %s`: sample_packing without flash, sdp, xformers, sage, flex attention or "
            "another one that knows document borders does not handle cross sample decontamination. Write `flash_attention: true`.",
            backend,
        )


def scaling_softmax_needs_flex_attention(cfg: DictDefault) -> None:
    """Scaled softmax is a score modification, which only flex attention has."""
    if cfg.scaling_softmax and cfg.attn_implementation != "flex_attention":
        raise ConfigError(
            f"`scaling_softmax: true` requires flex attention, but `attn_implementation: {cfg.attn_implementation}`. "
            "Write `attn_implementation: flex_attention`."
        )


def shifted_attention_is_not_compiled(cfg: DictDefault) -> None:
    """Groups of tokens are worked out from the documents of each batch, which a compiled layer would do anew for every shape."""
    if cfg.s2_attention and cfg.torch_compile is None:
        fill(cfg, "torch_compile", False, "`s2_attention` cuts each batch in groups of its own")


def large_head_attention_is_a_known_policy(cfg: DictDefault) -> None:
    """`large_head_attention` is auto, sdpa or triton_flash."""
    value = cfg.large_head_attention
    if value is None:
        return
    if str(value).lower() not in ("auto", "sdpa", "triton_flash"):
        raise ConfigError(f"`large_head_attention: {value}` must be one of auto, sdpa, triton_flash.")
    cfg.large_head_attention = str(value).lower()


def sdpa_varlen_is_for_packing(cfg: DictDefault) -> None:
    """`sdpa_varlen` changes how packed rows are computed, and needs torch 2.10."""
    if cfg.sdpa_varlen and not cfg.sample_packing:
        LOG.warning("`sdpa_varlen: true` has no effect without `sample_packing: true`.")
    if cfg.sdpa_varlen and torch_is_older_than(cfg, "2.10.0"):
        LOG.warning("`sdpa_varlen: true` is ignored: it needs torch >= 2.10.")


def sage_attention_needs_padding_an_adapter_and_a_gpu_it_was_built_for(cfg: DictDefault) -> None:
    """Sage attention is built for a few GPUs, and trains badly on ragged rows or full weights."""
    if hub_kernel(cfg.attn_implementation or "") not in ("sage", "kernels-community/sage-attention"):
        return
    if not cfg.sample_packing and not cfg.pad_to_sequence_len:
        LOG.warning(
            "SageAttention is recommended with `sample_packing: true` or `pad_to_sequence_len: true`; rows of many lengths are slow."
        )
    if not cfg.adapter:
        LOG.warning(
            "SageAttention without an adapter has been seen to drop the loss to 0. Write `adapter: lora`, or another attention."
        )
    found = compute_capability(cfg)
    if found is not None and found not in (80, 86, 89, 90, 120):
        raise ConfigError(
            f"`attn_implementation: {cfg.attn_implementation}`: SageAttention supports compute capability sm_80, sm_86, sm_89, sm_90 and "
            f"sm_120, but this GPU is sm_{found}. Write `attn_implementation: flash_attention_2`."
        )


def fp8_attention_needs_a_hopper_gpu_and_torch_2_11(cfg: DictDefault) -> None:
    """8-bit attention runs from sm_90 and torch 2.11."""
    if cfg.attn_implementation != "fp8":
        return
    found = compute_capability(cfg)
    if cfg.capabilities and (found is None or found < 90):
        raise ConfigError(
            "`attn_implementation: fp8` requires compute capability sm_90 or higher (Hopper), which this machine lacks. "
            "Write `attn_implementation: flash_attention_2`."
        )
    if torch_is_older_than(cfg, "2.11.0"):
        raise ConfigError(
            "`attn_implementation: fp8` requires torch >= 2.11.0. Update torch, or write `attn_implementation: flash_attention_2`."
        )


def flex_attention_needs_torch_2_6(cfg: DictDefault) -> None:
    """Flex attention trains from torch 2.6 on."""
    if cfg.attn_implementation == "flex_attention" and torch_is_older_than(cfg, "2.6.0"):
        raise ConfigError(
            "`attn_implementation: flex_attention`: Flex attention is not supported on torch version < 2.6.0. Update torch."
        )


def packing_on_sdpa_in_bf16_is_risky_before_hopper(cfg: DictDefault) -> None:
    """SDPA with a block-diagonal mask in bf16 has been seen to give a loss of 0 on GPUs older than Hopper."""
    found = compute_capability(cfg)
    if (
        cfg.sample_packing
        and cfg.attn_implementation == "sdpa"
        and (cfg.bf16 or cfg.bfloat16)
        and found is not None
        and found < 90
    ):
        LOG.warning(
            "sample_packing & torch sdpa with bf16 is unsupported on this GPU (sm_%s): it may result in 0.0 loss. Write `flash_attention: true`.",
            found,
        )


CHECKS = (
    attn_implementation_is_a_canonical_name_or_a_hub_kernel,
    one_switch_chooses_the_attention,
    flash_attn_d512_is_now_large_head_attention,
    gemma4_hybrid_attention_builds_on_flash_attention_2,
    packing_chooses_an_attention_that_knows_borders,
    packing_needs_an_attention_that_keeps_documents_apart,
    scaling_softmax_needs_flex_attention,
    shifted_attention_is_not_compiled,
    large_head_attention_is_a_known_policy,
    sdpa_varlen_is_for_packing,
    sage_attention_needs_padding_an_adapter_and_a_gpu_it_was_built_for,
    fp8_attention_needs_a_hopper_gpu_and_torch_2_11,
    flex_attention_needs_torch_2_6,
    packing_on_sdpa_in_bf16_is_risky_before_hopper,
)
