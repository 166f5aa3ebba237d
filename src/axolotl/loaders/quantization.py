"""Quantized loading: bitsandbytes 4 and 8 bits, GPTQ and the formats that transformers reads by itself."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, GPTQConfig, PretrainedConfig

from axolotl.exceptions import MissingExtraError
from axolotl.model_support import read_model_support
from axolotl.utils.dict import DictDefault

_BNB_KEYS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")


def is_quantized(model: nn.Module) -> bool:
    """Whether `model` was loaded by a quantizer."""
    return getattr(model, "hf_quantizer", None) is not None


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
        return quantizer(**(cfg.model_quantization_config_kwargs or {}))
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
    return BitsAndBytesConfig(**read_bnb_options(cfg, model_config, dtype))


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
