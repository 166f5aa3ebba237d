"""Adapters: LoRA, QLoRA and those that plugins bring.

In: a model of transformers and the `lora_*` and `peft_*` keys. Out: a `PeftModel` and its config.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import AdaptionPromptConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from axolotl.exceptions import ConfigError, ModelError
from axolotl.integrations.base import PluginManager
from axolotl.loaders.adapter_base import check_fits_base
from axolotl.loaders.adapter_config import (
    build_lora_config,
    find_all_linear_names,
    read_loftq_bits,
    resolve_target_modules,
)
from axolotl.loaders.adapter_init import load_trained, save_as_difference, start_with_loftq, takes_out_of_base
from axolotl.loaders.data_starts import DATA_STARTS, DataStart, start_from_data, take_ranks
from axolotl.loaders.tied_factors import share_tied_factors
from axolotl.loaders.utils import LORA_ADAPTERS
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger

__all__ = [
    "build_lora_config",
    "cast_for_half_precision_attention",
    "find_all_linear_names",
    "freeze_base",
    "load_adapter",
    "load_lora",
    "resolve_target_modules",
    "setup_quantized_meta_for_peft",
    "setup_quantized_peft_meta_for_training",
]

LOG = get_logger(__name__)


def _quantized_4bit_parameters(model: nn.Module) -> Iterable[Any]:
    return (parameter for parameter in model.parameters() if getattr(parameter, "quant_state", None) is not None)


def setup_quantized_meta_for_peft(model: nn.Module) -> None:
    """Keep peft from moving the quantization state of 4-bit weights to the meta device.

    `quant_state.to` becomes a method that returns the state as it is, until `setup_quantized_peft_meta_for_training`.
    """

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    for parameter in _quantized_4bit_parameters(model):
        state = parameter.quant_state
        if "_orig_to" not in vars(state):
            state._orig_to = state.to
            state.to = types.MethodType(stay, state)


def setup_quantized_peft_meta_for_training(model: nn.Module) -> None:
    """Give `quant_state.to` back what `setup_quantized_meta_for_peft` took, so that training can move weights."""
    for parameter in _quantized_4bit_parameters(model):
        state = parameter.quant_state
        if "_orig_to" in vars(state):
            state.to = vars(state).pop("_orig_to")


def load_lora(
    model: PreTrainedModel,
    cfg: DictDefault,
    inference: bool = False,
    config_only: bool = False,
    data_start: DataStart | None = None,
) -> tuple[PreTrainedModel | PeftModel | None, PeftConfig | None]:
    """LoRA on `model`: new, or continued from `lora_model_dir`.

    Args:
        inference: load the adapter frozen.
        config_only: return `(None, config)` and leave the model alone, for trainers that adapt the model themselves.
        data_start: the rows to start from, with `peft_init_lora_weights: eva | corda | lora_ga`.

    Raises:
        ModelError: `lora_model_dir` is not there or does not fit the model; targets that match nothing.
    """
    if cfg.lora_model_dir and not config_only:
        return _load_trained(model, cfg, inference)
    config = build_lora_config(model, cfg)
    if config_only:
        return None, config
    setup_quantized = _is_on_meta(model)
    if setup_quantized:
        setup_quantized_meta_for_peft(model)
    if data_start is not None:
        take_ranks(config, data_start)
    adapted = _start(model, config, cfg)
    if setup_quantized:
        setup_quantized_peft_meta_for_training(model)
    if data_start and data_start.rows is not None:
        adapted = start_from_data(adapted, data_start, lambda plain, ranked: _start(plain, ranked, cfg))
        config = adapted.peft_config["default"]
    trainable, total = adapted.get_nb_trainable_parameters()
    LOG.info(f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.3f} %)")
    return adapted, config


def _start(model: nn.Module, config: PeftConfig, cfg: DictDefault) -> PeftModel:
    """`model` with a new adapter, started as the config says.

    Raises:
        ConfigError: peft cannot start these layers so.
    """
    autocast = cfg.peft_autocast_adapter_dtype is not False
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=autocast)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"peft cannot put this adapter on `base_model: {cfg.base_model}`: {error} Check `lora_target_modules`, "
            f"`lora_target_parameters` and `peft_init_lora_weights: {cfg.peft_init_lora_weights}`."
        ) from error
    assert isinstance(adapted, PeftModel)
    if not isinstance(config, LoraConfig):
        return adapted
    share_tied_factors(adapted)
    init = cfg.peft_init_lora_weights if cfg.peft_init_lora_weights in DATA_STARTS else config.init_lora_weights
    if takes_out_of_base(init):
        save_as_difference(adapted)
    bits = read_loftq_bits(cfg)
    if bits is not None:
        start_with_loftq(adapted, bits)
    return adapted


def _is_on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _load_trained(model: PreTrainedModel, cfg: DictDefault, inference: bool) -> tuple[PeftModel, PeftConfig]:
    folder = str(cfg.lora_model_dir)
    if Path(folder).is_dir() and not (Path(folder) / "adapter_config.json").exists():
        raise ModelError(f"`lora_model_dir: {folder}` holds no adapter: adapter_config.json is missing.")
    keywords: dict[str, Any] = {"is_trainable": not inference}
    if cfg.max_memory:
        keywords["max_memory"] = dict(cfg.max_memory)
    if cfg.lora_on_cpu:
        keywords["torch_device"] = "cpu"
    if cfg.peft_autocast_adapter_dtype is False:
        keywords["autocast_adapter_dtype"] = False
    check_fits_base(folder, model.config, key="lora_model_dir", base_name=str(cfg.base_model))
    try:
        adapted = load_trained(model, folder, **keywords)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # torch names the tensors that do not fit on the lines after the first.
        said = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise ModelError(
            f"`lora_model_dir: {folder}` cannot be loaded onto `base_model: {cfg.base_model}`: {said} An adapter fits the "
            "model that it was trained on, and its files must be whole."
        ) from error
    config = adapted.peft_config["default"]
    if not isinstance(config, LoraConfig):
        return adapted, config
    share_tied_factors(adapted)
    for key, mine, theirs in (("lora_r", cfg.lora_r, config.r), ("lora_alpha", cfg.lora_alpha, config.lora_alpha)):
        if mine is not None and mine != theirs:
            note_choice(
                cfg, key, theirs, f"the adapter in `lora_model_dir` was made with it; `{key}: {mine}` has no effect"
            )
    return adapted, config


def load_llama_adapter(
    model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
) -> tuple[PreTrainedModel | PeftModel | None, PeftConfig | None]:
    """LLaMA-Adapter (https://arxiv.org/abs/2303.16199): learnt prompts in the attention of the upper layers.

    Args and errors are those of `load_lora`.
    """
    if cfg.lora_model_dir and not config_only:
        return _load_trained(model, cfg, inference)
    size = cfg.peft_adapter or DictDefault()
    num_layers = model.config.get_text_config().num_hidden_layers
    if (size.layers or 0) > num_layers:
        raise ConfigError(f"`peft_adapter: {{layers: {size.layers}}}`: the model has only {num_layers} layers.")
    layers = size.layers or max(1, num_layers - 2)
    length = size.len or 10
    if not (size.layers and size.len):
        chosen = {"layers": layers, "len": length}
        note_choice(cfg, "peft_adapter", chosen, "as in the paper: ten tokens, in all layers but the lowest two")
    config = AdaptionPromptConfig(adapter_layers=layers, adapter_len=length, task_type="CAUSAL_LM")
    if config_only:
        return None, config
    return _start(model, config, cfg), config


def load_adapter(
    model: PreTrainedModel,
    cfg: DictDefault,
    adapter: str | None,
    inference: bool = False,
    config_only: bool = False,
    data_start: DataStart | None = None,
) -> tuple[Any, PeftConfig | None]:
    """Put the adapter named by `adapter` on `model`; without one the model comes back as it is. Arguments as `load_lora`.

    Returns:
        The adapted model and its config; `(None, config)` with `config_only`.

    Raises:
        ConfigError: nobody brings an adapter of this name.
    """
    if adapter is None:
        return model, None
    if cfg.gradient_checkpointing and not inference:
        # Reentrant checkpointing passes gradients only through inputs that ask for them, and the embedding is frozen.
        model.enable_input_require_grads()
    built = PluginManager.get_instance().load_adapter(model, cfg, inference=inference, config_only=config_only)
    if built is not None:
        return built
    if adapter in LORA_ADAPTERS:
        return load_lora(model, cfg, inference=inference, config_only=config_only, data_start=data_start)
    if adapter == "llama-adapter":
        return load_llama_adapter(model, cfg, inference=inference, config_only=config_only)
    raise ConfigError(f"`adapter: {adapter}` is not built. Write `lora` or `qlora`, or list the plugin that brings it.")


def freeze_base(model: nn.Module) -> None:
    """Freeze every parameter; the adapter's own come later."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def cast_for_half_precision_attention(model: nn.Module, dtype: torch.dtype, embedding_layers: Iterable[str]) -> None:
    """Cast norms and embeddings, which peft lifts to fp32 for quantized models, back to `dtype`."""
    wanted = tuple(embedding_layers)
    for name, module in model.named_modules():
        if "norm" in name.rsplit(".", 1)[-1] or name.endswith(wanted):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
