"""Quantized loading: bitsandbytes 4 and 8 bits, GPTQ and the formats that transformers reads by itself."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, GPTQConfig, PretrainedConfig

from axolotl.exceptions import ConfigError, MissingExtraError
from axolotl.model_support import read_model_support
from axolotl.utils.dict import DictDefault

_BNB_KEYS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")


def is_quantized(model: nn.Module) -> bool:
    """Whether `model` was loaded by a quantizer."""
    return getattr(model, "hf_quantizer", None) is not None


def num_values(parameter: nn.Parameter) -> int:
    """Values of a weight. One in 4 bits is stored in fewer and larger elements."""
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes
    if state:
        return state.shape.numel()
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of a model, by their values."""
    trainable = sum(num_values(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return trainable, sum(map(num_values, model.parameters()))


def read_quantization_config(cfg: DictDefault, model_config: PretrainedConfig, dtype: torch.dtype) -> Any | None:
    """What `from_pretrained` is given as `quantization_config`, or None for plain and for already quantized weights.

    Args:
        dtype: dtype to compute in.

    Raises:
        MissingExtraError: bitsandbytes is needed and not installed.
    """
    stored = getattr(model_config, "quantization_config", None)
    if cfg.model_quantization_config:
        quantizer = getattr(transformers, cfg.model_quantization_config)
        options = dict(cfg.model_quantization_config_kwargs or {})
        return _build(quantizer, options, options, "model_quantization_config_kwargs")
    if cfg.gptq:
        options = dict(stored) if isinstance(stored, dict) else {}
        if cfg.gptq_disable_exllama is not None:
            options["use_exllama"] = not cfg.gptq_disable_exllama
        return GPTQConfig(**options) if options else None
    if stored is not None or not (cfg.load_in_4bit or cfg.load_in_8bit):
        return None
    key = "load_in_4bit" if cfg.load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "bitsandbytes", f"`{key}: true`")
    written = dict(cfg.bnb_config_kwargs or {})
    return _build(BitsAndBytesConfig, read_bnb_options(cfg, model_config, dtype), written, "bnb_config_kwargs")


def _build(quantizer: Any, options: dict[str, Any], written: dict[str, Any], key: str) -> Any:
    """A quantization config.

    Raises:
        ConfigError: what was written under `key` is unknown or has a wrong value. transformers ignores unknown names.
    """
    known = [name for name in inspect.signature(quantizer.__init__).parameters if name not in ("self", "kwargs")]
    unknown = [name for name in written if name not in known]
    if unknown:
        raise ConfigError(
            f"`{key}: {{{unknown[0]}: ...}}` is not an option of {quantizer.__name__}: {', '.join(known)}."
        )
    if options.get("bnb_4bit_quant_type", "nf4") not in ("nf4", "fp4"):
        raise ConfigError(f"`bnb_4bit_quant_type: {options['bnb_4bit_quant_type']}` is not nf4 or fp4.")
    try:
        return quantizer(**options)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"`{key}: {written}` cannot be used: {error}.") from error


def read_bnb_options(cfg: DictDefault, model_config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Options of `BitsAndBytesConfig`: NF4 with double quantization, unless `bnb_config_kwargs` or `bnb_4bit_*` say else."""
    support = read_model_support(model_config.model_type)
    options: dict[str, Any]
    if cfg.load_in_4bit:
        options = {
            "load_in_4bit": True,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_quant_storage": getattr(torch, support.quant_storage),
        }
        options.update({key: cfg[key] for key in _BNB_KEYS if cfg[key] is not None})
    else:
        options = {"load_in_8bit": True}
    if support.int8_skip_modules:
        options["llm_int8_skip_modules"] = list(support.int8_skip_modules)
    options.update(cfg.bnb_config_kwargs or {})
    return options


def keep_4bit_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for CPUs with AVX512-BF16 when a model first answers.

    Packed weights let no gradient through and are read wrongly by everything that dequantizes them (DoRA, merging), so that
    training would go wrong, silently, after the first evaluation. On other devices the attribute has no effect.
    """
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes") and "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def requantize_(layer: nn.Module, weight: torch.Tensor) -> None:
    """Set the weight of a linear or embedding layer, in place, in the number format that it has.

    Args:
        layer: plain, or of bitsandbytes in 4 or 8 bits.
        weight: on the CPU, unquantized.
    """
    old: Any = layer.weight
    kind = type(old).__name__
    if kind == "Params4bit":
        dtype = old.quant_state.dtype if old.quant_state is not None else weight.dtype
        layer.weight = type(old)(
            weight.to(dtype).contiguous(),
            requires_grad=False,
            quant_type=old.quant_type,
            compress_statistics=old.compress_statistics,
            blocksize=old.blocksize,
            quant_storage=old.quant_storage,
            module=layer,
        ).to(old.device)
    elif kind == "Int8Params":
        layer.weight = type(old)(
            weight.to(torch.float16).contiguous(), requires_grad=False, has_fp16_weights=old.has_fp16_weights
        ).to(old.device)
        layer.state.CB = layer.state.SCB = None
    else:
        old.copy_(weight)
