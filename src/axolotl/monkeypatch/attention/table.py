"""The attention backends, one row each, and the choice of what a run really uses.

`attn_implementation` is the one switch; the older flags (`flash_attention: true`, ...) have become it before this module
reads the config. A row says what transformers is given, whether documents are told by borders, and when it can be used.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from axolotl.exceptions import ConfigError
from axolotl.model_support import read_model_support
from axolotl.monkeypatch.attention import flash4, shifted, varlen
from axolotl.utils.dict import DictDefault, note_choice


@dataclass(frozen=True)
class AttentionBackend:
    """One row of `ATTENTION`.

    Attributes:
        name: the canonical value of `attn_implementation`.
        implementation: what transformers is given as `attn_implementation`.
        varlen: takes one long row of documents with `cu_seq_lens_*`; otherwise rows with `position_ids`.
        package: import name of the compiled package that it needs on CUDA, or None.
        refused: why it cannot be used at all and what to write instead, or None.
    """

    name: str
    implementation: str
    varlen: bool = False
    package: str | None = None
    refused: str | None = None


# Values of `layer_types` in transformers' configs; "hybrid" layers hold attention beside a state space.
_RECURRENT = frozenset(("linear_attention", "mamba", "conv", "recurrent", "hybrid"))

_INSTEAD = (
    "Write `attn_implementation: flash_attention_2` (the best varlen kernel present), `flex_attention` or `sdpa`."
)

ATTENTION: dict[str, AttentionBackend] = {
    backend.name: backend
    for backend in (
        AttentionBackend("eager", "eager"),
        AttentionBackend("sdpa", "sdpa"),
        AttentionBackend("flash_attention_2", "flash_attention_2", varlen=True, package="flash_attn"),
        AttentionBackend("flash_attention_3", "flash_attention_3", varlen=True, package="flash_attn_interface"),
        AttentionBackend("flash_attention_4", "flash_attention_4", varlen=True, package=flash4.PACKAGE),
        AttentionBackend("flash_attention_torch", varlen.NAME, varlen=True),
        AttentionBackend("flex_attention", "flex_attention"),
        AttentionBackend("xformers", varlen.NAME, varlen=True),
        AttentionBackend("sage", "sage", varlen=True, refused=f"SageAttention has no backward pass here. {_INSTEAD}"),
        AttentionBackend("fp8", "fp8", refused=f"fp8 attention is not built here. {_INSTEAD}"),
    )
}

# Best first: what `flash_attention_2` may be upgraded to when the packages are there.
_FLASH_PACKAGES = ("flash_attention_4", "flash_attention_3", "flash_attention_2")


def _package_present(name: str) -> bool:
    """Whether a package can be imported, without importing it."""
    parent, _, _ = name.rpartition(".")
    if parent and importlib.util.find_spec(parent) is None:
        return False
    return importlib.util.find_spec(name) is not None


def _soft_cap(config: PretrainedConfig) -> float | None:
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def recurrent_layers(config: PretrainedConfig) -> list[str]:
    """Kinds of layers that carry a state from token to token (state spaces, linear attention, convolutions)."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    return sorted({kind for kind in kinds if kind in _RECURRENT})


def check_packing(cfg: DictDefault, config: PretrainedConfig) -> None:
    """Raise ConfigError where packed documents would leak into each other through layers that are not attention."""
    kinds = recurrent_layers(config)
    if cfg.sample_packing and kinds:
        raise ConfigError(
            f"`sample_packing: true` cannot be used with `base_model: {cfg.base_model}`: its {', '.join(kinds)} layers carry a state "
            "from one packed document into the next. Write `sample_packing: false`."
        )
    chunk, sequence_len = _chunk(config), int(cfg.sequence_len or 0)
    if cfg.sample_packing and chunk and chunk < sequence_len:
        raise ConfigError(
            f"`sample_packing: true` cannot be used with `sequence_len: {sequence_len}` and `base_model: {cfg.base_model}`: the model "
            f"attends in chunks of {chunk} tokens, which would be counted from the start of the packed row instead of the document. "
            f"Write `sequence_len: {chunk}` or less, or `sample_packing: false`."
        )


def _chunk(config: PretrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "attention_chunk_size", None)


def varlen_refusal(
    config: PretrainedConfig, model_class: type[PreTrainedModel] | None, sequence_len: int
) -> str | None:
    """Why `axolotl_varlen` cannot serve this architecture, or None when it can."""
    if model_class is None or not model_class._supports_attention_backend:
        return "the model does not pass attention keywords through to its layers"
    refused = read_model_support(config.get_text_config().model_type).varlen_refused
    if refused:
        return refused
    if recurrent_layers(config):
        return "the model has recurrent layers, which read the padding mask"
    chunk = _chunk(config)
    if chunk and chunk < sequence_len:
        return f"the model attends in chunks of {chunk} tokens"
    return None


def _has_large_heads(config: PretrainedConfig) -> bool:
    """Whether a head is wider than flash attention takes."""
    fields = config.get_text_config().to_dict()
    layers = (fields.get("per_layer_config") or {}).values()
    widths = [fields.get("head_dim"), fields.get("global_head_dim"), *(layer.get("head_dim") for layer in layers)]
    known = [width for width in widths if width]
    return (
        max(known or [fields.get("hidden_size", 0) // (fields.get("num_attention_heads") or 1)])
        > varlen.MAX_KERNEL_HEAD_DIM
    )


def _best_flash(wanted: str, config: PretrainedConfig, model_class: Any, sequence_len: int) -> tuple[str, str]:
    """What stands behind `flash_attention_2/3/4` on this machine, and why."""
    cuda = torch.cuda.is_available()
    dropout = getattr(config.get_text_config(), "attention_dropout", 0.0)  # which releases 3 and 4 lack
    if cuda and not _has_large_heads(config) and (model_class is None or model_class._supports_flash_attn):
        candidates = _FLASH_PACKAGES if wanted == "flash_attention_2" else (wanted,)
        for name in candidates:
            package = ATTENTION[name].package
            if name == "flash_attention_4" and _flash4_serves(config, model_class, sequence_len):
                return varlen.NAME, "package flash-attn-4 is installed, and compiled layers see through its operators"
            upgraded = name != wanted
            if upgraded and (dropout or (name == "flash_attention_4" and not flash4.is_usable(torch.device("cuda")))):
                continue
            if package and _package_present(package):
                if name == "flash_attention_2" and _own_kernel_serves(config, model_class, sequence_len):
                    return (
                        varlen.NAME,
                        f"PyTorch has the kernel of {package} built in, and compiled layers see through it",
                    )
                return name, f"package {package} is installed"
    refusal = varlen_refusal(config, model_class, sequence_len)
    if refusal:
        return "sdpa", f"{refusal}; documents are kept apart by a block-diagonal mask"
    if not cuda:
        return varlen.NAME, "there is no CUDA device; each document goes through scaled_dot_product_attention"
    if (_soft_cap(config) is not None or not model_class._supports_sdpa) and model_class._supports_flex_attn:
        return (
            "flex_attention",
            "the model caps its scores or has attention sinks, which PyTorch's varlen kernel cannot do",
        )
    return varlen.NAME, "no flash-attn package is installed; PyTorch's own varlen kernel does the same"


def _own_kernel_serves(config: PretrainedConfig, model_class: Any, sequence_len: int) -> bool:
    """Whether PyTorch's varlen kernel, which is that of flash-attn 2, does all that the model asks of attention."""
    text = config.get_text_config()
    return (
        varlen.varlen_attn is not None
        and model_class is not None
        and bool(model_class._supports_sdpa)
        and _soft_cap(config) is None
        and not getattr(text, "attention_dropout", 0.0)
        and varlen_refusal(config, model_class, sequence_len) is None
    )


def _flash4_serves(config: PretrainedConfig, model_class: Any, sequence_len: int) -> bool:
    """Whether FlashAttention-4 is installed, made for this GPU, and does all that the model asks of attention."""
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return (
        torch.cuda.is_available()
        and flash4.is_usable(torch.device("cuda"))
        and head_size in flash4.HEAD_SIZES
        and _own_kernel_serves(config, model_class, sequence_len)
    )


def _sdpa_may_be_varlen(cfg: DictDefault, config: PretrainedConfig, model_class: Any, sequence_len: int) -> bool:
    packed = bool(cfg.sample_packing)
    return packed and cfg.sdpa_varlen is not False and varlen_refusal(config, model_class, sequence_len) is None


def _shifted(cfg: DictDefault, config: PretrainedConfig, model_class: Any, sequence_len: int) -> str:
    """What `s2_attention: true` trains with."""
    refusal = varlen_refusal(config, model_class, sequence_len)
    if config.get_text_config().num_attention_heads % 2:
        refusal = "it has an odd number of heads, of which half would be shifted"
    if refusal:
        raise ConfigError(
            f"`s2_attention: true` cannot be used with `base_model: {cfg.base_model}`: {refusal}. Remove it. {_INSTEAD}"
        )
    note_choice(
        cfg, "attn_implementation", shifted.NAME, "`s2_attention: true`; evaluation and generation attend in full"
    )
    return shifted.NAME


def resolve_attention(
    cfg: DictDefault, config: PretrainedConfig, model_class: type[PreTrainedModel] | None, *, inference: bool = False
) -> str | None:
    """What transformers is told as `attn_implementation`; None leaves the choice to transformers.

    Args:
        cfg: `attn_implementation`, `sample_packing`, `sdpa_varlen`, `sequence_len` are read; the choice is noted in it.
        config: the model's config.
        model_class: the class that will be built, or None when it comes from remote code.
        inference: generation with a cache gains nothing from varlen kernels.

    Raises:
        ConfigError: a backend that is not built, or an unknown name.
    """
    wanted = cfg.attn_implementation
    sequence_len = int(cfg.sequence_len or 0)
    if wanted is not None and "/" in wanted:
        return wanted  # a kernel of the hub, loaded by transformers
    if wanted is not None and wanted not in ATTENTION:
        raise ConfigError(f"`attn_implementation: {wanted}` is not known. Write one of: {', '.join(ATTENTION)}.")
    if wanted is not None and ATTENTION[wanted].refused:
        raise ConfigError(f"`attn_implementation: {wanted}` cannot be used: {ATTENTION[wanted].refused}")

    if cfg.s2_attention and not inference:
        return _shifted(cfg, config, model_class, sequence_len)

    supports_sdpa = (model_class is None or model_class._supports_sdpa) and _soft_cap(config) is None
    chosen, reason = wanted, "as written"
    if wanted in _FLASH_PACKAGES:
        chosen, reason = _best_flash(wanted, config, model_class, sequence_len)
        if inference and chosen == varlen.NAME:
            chosen, reason = "sdpa", "generation with a cache gains nothing from a varlen kernel"
    elif wanted in ("flash_attention_torch", "xformers"):
        refusal = varlen_refusal(config, model_class, sequence_len)
        chosen = varlen.NAME if refusal is None else "sdpa"
        reason = refusal or "PyTorch's own varlen kernel; xformers is not needed for it"
    elif wanted == "flex_attention" and not torch.cuda.is_available():
        refusal = varlen_refusal(config, model_class, sequence_len)
        chosen = varlen.NAME if refusal is None else "sdpa"
        reason = "flex_attention has no backward pass on a CPU"
    elif wanted in (None, "sdpa") and _sdpa_may_be_varlen(cfg, config, model_class, sequence_len) and not inference:
        chosen = varlen.NAME
        reason = (
            "packed documents go through sdpa one by one instead of under a mask (`sdpa_varlen: false` turns it off)"
        )
    elif wanted is None and not inference and _flash4_serves(config, model_class, sequence_len):
        chosen = varlen.NAME
        reason = (
            "package flash-attn-4 is installed, whose kernels are faster than those of scaled_dot_product_attention"
        )
    if (chosen == "sdpa" and not supports_sdpa) or (chosen is None and _soft_cap(config) is not None):
        refusal = varlen_refusal(config, model_class, sequence_len)
        chosen = varlen.NAME if refusal is None else "eager"
        reason = (
            "the model caps its scores, which sdpa cannot do"
            if _soft_cap(config)
            else "the model has no sdpa attention"
        )
    if chosen is not None:
        note_choice(cfg, "attn_implementation", chosen, reason if wanted else f"not set; {reason}")
    return chosen
