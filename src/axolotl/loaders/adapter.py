"""Adapters: LoRA, QLoRA and those that plugins bring.

In: a model of transformers and the `lora_*` and `peft_*` keys. Out: a `PeftModel` and its config. Targets are checked
against the model before peft sees them, because peft is silent about a name that matches nothing beside one that matches.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoftQConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from axolotl.exceptions import ConfigError, ModelError
from axolotl.integrations.base import PluginManager
from axolotl.loaders.utils import get_linear_embedding_layers
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

LORA_ADAPTERS = ("lora", "qlora")

# Auto classes whose head is trained in full beside LoRA; peft knows them by a task type.
_TASK_TYPES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


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


def find_all_linear_names(model: PreTrainedModel) -> list[str]:
    """Last names of all linear layers, quantized ones too, except the output embedding."""
    output = model.get_output_embeddings()
    output_name = get_linear_embedding_layers(model.config.model_type)[1]
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if (isinstance(module, (nn.Linear, Conv1D)) or "QuantLinear" in type(module).__name__) and module is not output
    }
    return sorted(names - {output_name})


def _match_modules(names: list[str], target: str) -> list[str]:
    """Names that peft takes for `target` in a list: itself, or ends with `.target`."""
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _explain_no_match(key: str, value: Any, names: list[str]) -> ModelError:
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names if name and not name.rsplit(".", 1)[-1].isdigit()})
    wanted = [value] if isinstance(value, str) else list(value)
    near = {close for target in wanted for close in difflib.get_close_matches(target.rsplit(".", 1)[-1], leaves, n=2)}
    hint = f" Did you mean {', '.join(sorted(near))}?" if near else ""
    return ModelError(
        f"`{key}: {value}` matches nothing in the model.{hint} It has {', '.join(leaves)}. "
        "`lora_target_linear: true` takes every linear layer."
    )


def resolve_target_modules(
    model: PreTrainedModel,
    target_modules: str | list[str] | None,
    *,
    target_linear: bool,
    key: str = "lora_target_modules",
) -> str | list[str]:
    """What peft is given as `target_modules`.

    Args:
        target_modules: names, or one regular expression for whole names. An entry of a list that names no module but
            matches some as a regular expression stands for these.
        target_linear: add every linear layer except the output embedding.

    Raises:
        ModelError: nothing matches.
        ConfigError: a regular expression that is none.
    """
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(target_modules, str) and not target_linear:
        if target_modules == "all-linear":
            return target_modules
        if not _match_regex(names, target_modules, key):
            raise _explain_no_match(key, target_modules, names)
        return target_modules
    targets: list[str] = []
    unmatched: list[str] = []
    for target in [target_modules] if isinstance(target_modules, str) else target_modules or []:
        if _match_modules(names, target):
            targets.append(target)
            continue
        found = _match_regex(names, target, key)
        targets += found
        if not found:
            unmatched.append(target)
    if target_linear:
        targets += find_all_linear_names(model)
    if unmatched and not targets:
        raise _explain_no_match(key, target_modules, names)
    if unmatched:
        LOG.warning(f"`{key}`: {', '.join(unmatched)} match nothing in the model; the others do.")
    return sorted(set(targets))


def _match_regex(names: list[str], pattern: str, key: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"`{key}: {pattern}` is not a regular expression: {error}.") from error
    return [name for name in names if compiled.fullmatch(name)]


def _check_modules_to_save(model: nn.Module, modules: list[str]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    missing = [module for module in modules if not _match_modules(names, module)]
    if missing:
        raise _explain_no_match("lora_modules_to_save", missing, names)


def _init_keywords(cfg: DictDefault) -> dict[str, Any]:
    """Keywords of `LoraConfig` that say how the matrices start and are shaped."""
    keywords: dict[str, Any] = {}
    loftq = cfg.peft.loftq_config if cfg.peft else None
    if loftq and loftq.loftq_bits:
        keywords["loftq_config"] = LoftQConfig(loftq_bits=loftq.loftq_bits)
        keywords["init_lora_weights"] = "loftq"
    same = {
        "init_lora_weights": cfg.peft_init_lora_weights,
        "use_dora": cfg.peft_use_dora,
        "use_rslora": cfg.peft_use_rslora,
        "layer_replication": [tuple(pair) for pair in cfg.peft_layer_replication]
        if cfg.peft_layer_replication
        else None,
        "trainable_token_indices": cfg.peft_trainable_token_indices,
        "ensure_weight_tying": cfg.peft_ensure_weight_tying,
        "rank_pattern": cfg.lora_rank_pattern,
        "alpha_pattern": cfg.lora_alpha_pattern,
        "exclude_modules": cfg.lora_exclude_modules,
    }
    for name, value in same.items():
        if value:
            keywords[name] = value.to_dict() if isinstance(value, DictDefault) else value
    if cfg.peft_init_lora_weights is False:
        keywords["init_lora_weights"] = False
    return keywords


def build_lora_config(model: PreTrainedModel, cfg: DictDefault) -> LoraConfig:
    """The `LoraConfig` that the `lora_*` and `peft_*` keys describe for `model`.

    Raises:
        ConfigError: nothing is targeted, or the installed peft lacks a keyword.
        ModelError: targets that match nothing.
    """
    modules = cfg.lora_target_modules or None
    parameters = cfg.lora_target_parameters or None
    parameters = [parameters] if isinstance(parameters, str) else parameters
    if not (modules or parameters or cfg.lora_target_linear):
        raise ConfigError(
            f"`adapter: {cfg.adapter}` has no target. Write `lora_target_linear: true`, or list layers under `lora_target_modules`."
        )
    if parameters:
        names = [name for name, _ in model.named_parameters()]
        if not any(_match_modules(names, parameter) for parameter in parameters):
            raise _explain_no_match("lora_target_parameters", parameters, names)
    if cfg.lora_modules_to_save:
        _check_modules_to_save(model, list(cfg.lora_modules_to_save))
    targets = resolve_target_modules(model, modules, target_linear=bool(cfg.lora_target_linear))
    if cfg.lora_target_linear:
        note_choice(
            cfg, "lora_target_modules", targets, "`lora_target_linear: true` takes every linear layer but the output"
        )
    keywords = {
        "r": cfg.lora_r,
        "lora_alpha": cfg.lora_alpha,
        "target_modules": targets,
        "target_parameters": parameters,
        "layers_to_transform": cfg.peft_layers_to_transform,
        "layers_pattern": cfg.peft_layers_pattern,
        "lora_dropout": cfg.lora_dropout or 0.0,
        "fan_in_fan_out": bool(cfg.lora_fan_in_fan_out),
        "modules_to_save": list(cfg.lora_modules_to_save) if cfg.lora_modules_to_save else None,
        "bias": "none",
        "task_type": next((task for end, task in _TASK_TYPES.items() if end in type(model).__name__), "CAUSAL_LM"),
        **_init_keywords(cfg),
        **PluginManager.get_instance().get_lora_config_kwargs(cfg),
    }
    keywords = {name: value for name, value in keywords.items() if value is not None}
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = sorted(keywords.keys() - known)
    if unknown:
        raise ConfigError(
            f"The installed peft has no {', '.join(unknown)} in LoraConfig. Upgrade peft, or drop the key."
        )
    try:
        return LoraConfig(**keywords)
    except ImportError as error:
        raise ModelError(
            f"These `lora_*` and `peft_*` keys need a package that peft does not bring: {error}"
        ) from error


def load_lora(
    model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
) -> tuple[PreTrainedModel | PeftModel | None, PeftConfig | None]:
    """LoRA on `model`: new, or continued from `lora_model_dir`.

    Args:
        inference: load the adapter frozen.
        config_only: return `(None, config)` and leave the model alone, for trainers that adapt the model themselves.

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
    autocast = cfg.peft_autocast_adapter_dtype is not False
    adapted = get_peft_model(model, config, autocast_adapter_dtype=autocast)
    if setup_quantized:
        setup_quantized_peft_meta_for_training(model)
    trainable, total = adapted.get_nb_trainable_parameters()
    LOG.info(f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.3f} %)")
    return adapted, config


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
    try:
        adapted = PeftModel.from_pretrained(model, folder, **keywords)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # torch names the tensors that do not fit on the lines after the first.
        said = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise ModelError(
            f"`lora_model_dir: {folder}` cannot be loaded onto `base_model: {cfg.base_model}`: {said} An adapter fits the "
            "model that it was trained on, and its files must be whole."
        ) from error
    config = adapted.peft_config["default"]
    for key, mine, theirs in (("lora_r", cfg.lora_r, config.r), ("lora_alpha", cfg.lora_alpha, config.lora_alpha)):
        if mine is not None and mine != theirs:
            note_choice(
                cfg, key, theirs, f"the adapter in `lora_model_dir` was made with it; `{key}: {mine}` has no effect"
            )
    return adapted, config


def load_adapter(
    model: PreTrainedModel, cfg: DictDefault, adapter: str | None, inference: bool = False, config_only: bool = False
) -> tuple[Any, PeftConfig | None]:
    """Put the adapter named by `adapter` on `model`; without one the model comes back as it is.

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
        return load_lora(model, cfg, inference=inference, config_only=config_only)
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
