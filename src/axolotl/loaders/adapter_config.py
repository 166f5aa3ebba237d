"""What a LoRA adapter is made of: the targets and keywords of peft's `LoraConfig`, read from the `lora_*` and `peft_*` keys.

Targets are checked against the model before peft sees them, because peft is silent about a name that matches nothing beside
one that matches.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from axolotl.exceptions import ConfigError, ModelError
from axolotl.integrations.base import PluginManager
from axolotl.loaders.data_starts import DATA_STARTS
from axolotl.loaders.utils import get_linear_embedding_layers
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

# Auto classes whose head is trained in full beside LoRA; peft knows them by a task type.
_TASK_TYPES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


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


def _check_target_parameters(model: nn.Module, parameters: list[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    missing = [parameter for parameter in parameters if not _match_modules(names, parameter)]
    if len(missing) == len(parameters):
        raise _explain_no_match("lora_target_parameters", parameters, names)
    if missing:
        LOG.warning(f"`lora_target_parameters`: {', '.join(missing)} match nothing in the model; the others do.")


def read_loftq_bits(cfg: DictDefault) -> int | None:
    """Bits of LoftQ, or None when it is not asked for."""
    loftq = cfg.peft.loftq_config if cfg.peft else None
    if loftq:
        return int(loftq.loftq_bits or 4)
    return 4 if cfg.peft_init_lora_weights == "loftq" else None


def _init_keywords(cfg: DictDefault) -> dict[str, Any]:
    """Keywords of `LoraConfig` that say how the matrices start and are shaped."""
    keywords: dict[str, Any] = {}
    same = {
        # These start after peft is done: its LoftQ needs a GPU and scipy, and the others rows.
        "init_lora_weights": None
        if read_loftq_bits(cfg) or cfg.peft_init_lora_weights in DATA_STARTS
        else cfg.peft_init_lora_weights,
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


def _check_numbers(model: PreTrainedModel, cfg: DictDefault) -> None:
    """Layers and token ids that `peft_*` keys name are in the model."""
    num_layers = model.config.get_text_config().num_hidden_layers
    for pair in cfg.peft_layer_replication or []:
        start, end = pair
        if not 0 <= start < end <= num_layers:
            raise ConfigError(
                f"`peft_layer_replication: {[list(pair) for pair in cfg.peft_layer_replication]}`: [{start}, {end}] is no range of the "
                f"{num_layers} layers of the model; the end is not part of a range."
            )
    layers = cfg.peft_layers_to_transform
    layers = [layers] if isinstance(layers, int) else layers or []
    if not cfg.peft_layers_pattern and any(not 0 <= layer < num_layers for layer in layers):
        raise ConfigError(
            f"`peft_layers_to_transform: {list(layers)}`: the model has the layers 0 to {num_layers - 1}."
        )
    tokens = cfg.peft_trainable_token_indices
    lists = tokens.values() if isinstance(tokens, dict) else [tokens or []]
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    outside = [token for ids in lists for token in ids if not 0 <= token < rows]
    if outside:
        raise ConfigError(
            f"`peft_trainable_token_indices`: {', '.join(map(str, outside))}: the embedding has the rows 0 to {rows - 1}."
        )


def _warn_of_idle_patterns(model: nn.Module, cfg: DictDefault) -> None:
    """peft says nothing of a pattern that no layer matches."""
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
    for key in ("lora_rank_pattern", "lora_alpha_pattern"):
        idle = [
            pattern for pattern in cfg[key] or {} if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
        ]
        if idle:
            LOG.warning(f"`{key}`: {', '.join(idle)} match nothing in the model.")
    excluded = cfg.lora_exclude_modules or []
    if isinstance(excluded, str):
        idle = [] if any(re.fullmatch(excluded, name) for name in names) else [excluded]
    else:
        idle = [name for name in excluded if not _match_modules(names, name)]
    if idle:
        LOG.warning(f"`lora_exclude_modules`: {', '.join(idle)} match nothing in the model.")


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
        _check_target_parameters(model, parameters)
    _check_numbers(model, cfg)
    if cfg.lora_modules_to_save:
        _check_modules_to_save(model, list(cfg.lora_modules_to_save))
    targets = resolve_target_modules(model, modules, target_linear=bool(cfg.lora_target_linear))
    _warn_of_idle_patterns(model, cfg)
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
