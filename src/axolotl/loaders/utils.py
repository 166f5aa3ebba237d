"""The model's config and the checks on it, before any weight is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig

from axolotl.exceptions import ConfigError, ModelError, first_line
from axolotl.model_support import read_model_support
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

LORA_ADAPTERS = ("lora", "qlora")


def find_class(key: str, name: str | None, default: str) -> Any:
    """The class of transformers that `key` names, by default `default`.

    Raises:
        ConfigError: there is no such class.
    """
    found = getattr(transformers, name or default, None)
    if found is None:
        raise ConfigError(f"`{key}: {name}` is not a class of transformers. Write `{default}`.")
    return found


def read_seed(cfg: DictDefault) -> int:
    """`seed`; a config that was not validated may lack it."""
    return 42 if cfg.seed is None else cfg.seed


def read_revision(cfg: DictDefault, source: str) -> str | None:
    """`revision_of_model`, for what comes from the model's own repository."""
    return cfg.revision_of_model if source == cfg.base_model else None


def read_base_model(cfg: DictDefault) -> str:
    """The base model to load: that of `base_model`, or the one that ReLoRA left beside the adapter of `lora_model_dir`.

    The adapter's config tells whether it is of ReLoRA: the folder may be left over from an earlier run.
    """
    merged = Path(cfg.lora_model_dir) / "relora" if cfg.lora_model_dir else None
    if merged is None or not merged.is_dir():
        return str(cfg.base_model)
    config = merged.with_name("adapter_config.json")
    named = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") if config.is_file() else None
    if named is not None and Path(named).name != merged.name:
        return str(cfg.base_model)
    note_choice(cfg, "base_model", str(merged), "the adapter in `lora_model_dir` was trained on it, by ReLoRA")
    return str(merged)


def explain_load_error(source: str, key: str, error: Exception) -> ModelError:
    """The error for a model, config or tokenizer that cannot be read, in the user's words.

    Args:
        source: the value of `key`: a folder or a name on the hub.
        key: `base_model`, `base_model_config`, `tokenizer_config` or `processor_config`.
        error: what transformers raised.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return _explain_bad_folder(path, source, key, error)
    if os.path.isfile(path):
        return ModelError(f"`{key}: {source}` is a file. Write the folder that holds it.")
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        return ModelError(
            f"`{key}: {source}` does not exist. Write a folder made by `save_pretrained`, or a name on the hub."
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            f"`{key}: {source}` comes with Python code of its own. Read that code and, if you trust it, write "
            "`trust_remote_code: true`."
        )
    return ModelError(
        f"`{key}: {source}` is not a folder here and could not be read from the Hugging Face hub: {first_line(error)} "
        "Check the name, the network and your login (`hf auth login`), or write the path of a local folder."
    )


def _explain_bad_folder(path: Path, source: str, key: str, error: Exception) -> ModelError:
    if not (path / "config.json").exists() and key in ("base_model", "base_model_config"):
        present = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        return ModelError(
            f"`{key}: {source}` has no config.json (it holds {present}). Write a folder made by `save_pretrained`, or set "
            "`base_model_config` to where the config is."
        )
    if "no file named" in str(error) and "safetensors" in str(error):
        return ModelError(
            f"`{key}: {source}` has a config but no weights. Write a folder made by `save_pretrained`, or "
            "`reinit_weights: true` to start from random weights."
        )
    if "backend tokenizer" in str(error):
        return ModelError(
            f"`{key}: {source}` holds no tokenizer. Copy tokenizer.json and tokenizer_config.json into it, or write where "
            "the tokenizer is as `tokenizer_config`."
        )
    if isinstance(error, SafetensorError):
        return ModelError(
            f"`{key}: {source}`: a file with weights is damaged or cut short ({first_line(error)}). Copy or download the "
            "model again."
        )
    if isinstance(error, StrictDataclassError):
        # Two lines: which check failed, and what it found.
        return ModelError(f"`{key}: {source}` has a config.json that is wrong: {' '.join(str(error).split())}")
    return ModelError(f"`{key}: {source}` cannot be loaded: {first_line(error)}")


def plain_model(model: Any) -> Any:
    """The model under an adapter; a model without one as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def get_linear_embedding_layers(model_type: str | None) -> list[str]:
    """Names of the input and output embedding of an architecture, such as `["embed_tokens", "lm_head"]`."""
    return list(read_model_support(model_type).embedding_layers)


def _override(config: PretrainedConfig, overrides: dict[str, Any]) -> PretrainedConfig:
    """`config` with `overrides_of_model_config`, read again as a whole so that dependent fields follow.

    Nested mappings merge key by key: `rope_parameters: {factor: 2}` keeps the base frequency.
    """
    merged = config.to_dict()
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = {**merged[key], **value}
        merged[key] = value
    if "rope_scaling" in overrides:
        # The older name of `rope_parameters`, which would win over it.
        rope = merged.pop("rope_scaling") or {}
        rope = {("rope_type" if key == "type" else key): value for key, value in rope.items()}
        merged["rope_parameters"] = {**(merged.get("rope_parameters") or {}), **rope}
    unknown = [key for key in overrides if key != "rope_scaling" and not hasattr(config, key)]
    if unknown:
        LOG.warning(
            f"`overrides_of_model_config` sets {', '.join(unknown)}, which {type(config).__name__} does not have by default; "
            "it has an effect only if the model reads it."
        )
    try:
        new = type(config).from_dict(merged)
    except (StrictDataclassError, TypeError, ValueError) as error:
        said = " ".join(line.strip() for line in str(error).splitlines())
        raise ConfigError(f"`overrides_of_model_config: {overrides}` is no {type(config).__name__}: {said}") from error
    new._name_or_path = config._name_or_path
    return new


def load_model_config(cfg: DictDefault) -> PretrainedConfig:
    """The config of `base_model_config` (by default `base_model`), with `overrides_of_model_config` applied.

    Raises:
        ModelError: it is not there, or cannot be read.
        ConfigError: the config contradicts the model (see `check_model_config`).
    """
    source = cfg.base_model_config or cfg.base_model
    key = "base_model_config" if cfg.base_model_config and cfg.base_model_config != cfg.base_model else "base_model"
    config_class = find_class("cls_model_config", cfg.cls_model_config, "AutoConfig")
    keywords: dict[str, Any] = {"trust_remote_code": bool(cfg.trust_remote_code)}
    revision = read_revision(cfg, source)
    if revision:
        keywords["revision"] = revision
    if cfg.num_labels is not None:
        keywords["num_labels"] = cfg.num_labels
    try:
        config = config_class.from_pretrained(source, **keywords)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise explain_load_error(str(source), key, error) from error
    if cfg.overrides_of_model_config:
        config = _override(config, cfg.overrides_of_model_config.to_dict())
    check_model_config(cfg, config)
    return config


def _quant_method(config: PretrainedConfig) -> str | None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(method, "value", method)) if method else None


def check_model_config(cfg: DictDefault, model_config: PretrainedConfig) -> None:
    """Raise ConfigError where `cfg` contradicts how the model's weights are stored."""
    method = _quant_method(model_config)
    if cfg.gptq and method != "gptq":
        raise ConfigError(
            f"`gptq: true`, but `base_model: {cfg.base_model}` is not quantized with GPTQ "
            f"(its `quant_method` is {method or 'not set'}). Point `base_model` to a GPTQ model, or drop `gptq`."
        )
    if method == "gptq" and not cfg.gptq and not cfg.merge_lora:
        raise ConfigError(f"`base_model: {cfg.base_model}` is quantized with GPTQ. Write `gptq: true`.")
    if method == "bitsandbytes" and cfg.adapter == "qlora":
        stored = model_config.quantization_config
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        if stored.get("load_in_8bit"):
            raise ConfigError(
                f"`adapter: qlora` needs 4-bit weights, but `base_model: {cfg.base_model}` is stored in 8 bits. "
                "Write `adapter: lora`, or point `base_model` to a 4-bit or unquantized model."
            )


def check_new_tokens_are_trained(
    cfg: DictDefault, new_tokens: list[str], model_config: PretrainedConfig, key: str
) -> None:
    """New tokens under an adapter must be trained: their embeddings are noise otherwise.

    Args:
        new_tokens: tokens that the vocabulary did not have.
        key: `special_tokens` or `tokens`, for the message.
    """
    if not new_tokens or cfg.adapter not in LORA_ADAPTERS or cfg.peft_trainable_token_indices:
        return
    needed = get_linear_embedding_layers(model_config.model_type)
    required = needed[:1] if model_config.get_text_config().tie_word_embeddings else needed
    if all(name in (cfg.lora_modules_to_save or []) for name in required):
        return
    listed = ", ".join(needed)
    raise ConfigError(
        f"`{key}` adds {', '.join(repr(token) for token in new_tokens)} to the vocabulary, but `adapter: {cfg.adapter}` does "
        f"not train embeddings. Please set `lora_modules_to_save` to [{listed}] when using an adapter and changing the "
        "special tokens, or list the ids under `peft_trainable_token_indices`."
    )


def ensure_dtype(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Cast the weights and biases of `model` that are not stored in `dtype`. Quantized (integer) weights are left alone."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
