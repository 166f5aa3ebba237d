"""Optimizers by name: one row for each that transformers does not know, and how `optimizer` becomes arguments."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from transformers.training_args import OptimizerNames

from axolotl.exceptions import ConfigError, MissingExtraError
from axolotl.utils.dict import DictDefault
from axolotl.utils.optimizers.adopt import ADOPT

# Spellings of older configs.
RENAMED = {"adamw_hf": "adamw_torch", "ao_adamw_4bit": "adamw_torch_4bit", "ao_adamw_8bit": "adamw_torch_8bit"}


def _adam_kwargs(args: Any) -> dict[str, Any]:
    return {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


def _import(package: str, path: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(path), name)
    except ImportError as error:
        raise MissingExtraError(package, "optimizers", f"`optimizer: {name}`") from error


def _adopt(cfg: DictDefault, args: Any) -> tuple[type, dict[str, Any]]:
    return ADOPT, {**_adam_kwargs(args), "decouple": True, **read_optim_args(cfg)}


def _optimi_adamw(cfg: DictDefault, args: Any) -> tuple[type, dict[str, Any]]:
    return _import("optimi", "optimi", "AdamW"), {**_adam_kwargs(args), "foreach": False, **read_optim_args(cfg)}


def _ao_adamw_fp8(cfg: DictDefault, args: Any) -> tuple[type, dict[str, Any]]:
    return _import("torchao", "torchao.optim", "AdamWFp8"), {**_adam_kwargs(args), **read_optim_args(cfg)}


def _came(cfg: DictDefault, args: Any) -> tuple[type, dict[str, Any]]:
    kwargs = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (
            args.adam_beta1 if cfg.adam_beta1 is not None else 0.9,
            args.adam_beta2 if cfg.adam_beta2 is not None else 0.999,
            args.adam_beta3 if args.adam_beta3 is not None else 0.9999,
        ),
        "eps": (
            args.adam_epsilon if cfg.adam_epsilon is not None else 1e-30,
            args.adam_epsilon2 if args.adam_epsilon2 is not None else 1e-16,
        ),
    }
    return _import("came_pytorch", "came_pytorch", "CAME"), {**kwargs, **read_optim_args(cfg)}


OPTIMIZERS: dict[str, Callable[[DictDefault, Any], tuple[type, dict[str, Any]]]] = {
    "adopt_adamw": _adopt,
    "ao_adamw_fp8": _ao_adamw_fp8,
    "came_pytorch": _came,
    "optimi_adamw": _optimi_adamw,
}


def read_optim_args(cfg: DictDefault) -> dict[str, Any]:
    """`optim_args` as a dict: given as one, or as `key=value,key=value` with Python literals as values."""
    given = cfg.optim_args
    if not given:
        return {}
    if isinstance(given, DictDefault):
        return given.to_dict()
    parsed: dict[str, Any] = {}
    for item in str(given).split(","):
        key, sign, value = item.partition("=")
        if not sign:
            raise ConfigError(f"`optim_args: {given}`: {item!r} is not of the form key=value.")
        parsed[key.strip()] = _literal(value.strip())
    return parsed


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_optimizer_args(cfg: DictDefault) -> dict[str, Any]:
    """Training arguments that choose the optimizer.

    Raises:
        ConfigError: no such optimizer; near names are shown.
    """
    name = str(getattr(cfg.optimizer, "value", cfg.optimizer) or "adamw_torch_fused")
    name = RENAMED.get(name, name)
    if name in OPTIMIZERS:
        return {"optim": "adamw_torch", "alternate_optimizer": name}
    known = [member.value for member in OptimizerNames]
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *OPTIMIZERS], n=3)
        hint = f" Did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
        raise ConfigError(f"`optimizer: {name}` is not known.{hint}")
    args: dict[str, Any] = {"optim": name}
    extra = read_optim_args(cfg)
    if extra:
        args["optim_args"] = ",".join(f"{key}={value}" for key, value in extra.items())
    return args
