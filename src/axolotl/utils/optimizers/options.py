"""`optim_args`: how they are read, and which options an optimizer takes.

They are those of the class's signature, so that they are those of the installed version.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch

from axolotl.exceptions import ConfigError, did_you_mean
from axolotl.utils.dict import DictDefault

# Arguments that this package sets itself.
NOT_OPTIONS = frozenset({"self", "params", "model", "optim_bits", "is_paged", "args", "gradient_release", "kwargs"})

# Values of options that are words.
CHOICES = {
    "proj_type": ("std", "reverse_std", "right", "left"),
    "proj": ("random", "svd"),
    "scale_type": ("channel", "tensor"),
    "adjust_lr_fn": ("original", "match_rms_adamw"),
}


def read_optim_args(cfg: DictDefault) -> dict[str, Any]:
    """`optim_args` as a dict: given as one, or as `key=value,key=value`. Text becomes the Python literal that it spells."""
    given = cfg.optim_args
    if not given:
        return {}
    if isinstance(given, Mapping):
        return {str(key): _literal(value) for key, value in given.items()}
    parsed: dict[str, Any] = {}
    for item in re.split(r",(?![^(\[]*[)\]])", str(given)):
        key, sign, value = item.partition("=")
        if not sign:
            raise ConfigError(f"`optim_args: {given}`: {item!r} is not of the form key=value.")
        parsed[key.strip()] = _literal(value.strip())
    return parsed


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    if value.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(value.lower())
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return tuple(found) if isinstance(found, list) else found


def options_of(cls: type) -> dict[str, Any]:
    """Options that a class takes, with their defaults."""
    parameters = inspect.signature(cls.__init__).parameters
    return {name: p.default for name, p in parameters.items() if name not in NOT_OPTIONS}


def check_options(name: str, options: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` with values of the right types.

    Args:
        name: of the optimizer, for errors.
        options: those that it takes, with their defaults.
        given: `optim_args`.

    Raises:
        ConfigError: every option that is unknown or has a value of another type.
    """
    betas = options.get("betas")
    accepted = {**options, **{f"beta{i}": beta for i, beta in enumerate(betas or (), start=1)}}
    problems, checked = [], {}
    for key, value in given.items():
        if key not in accepted:
            hint = did_you_mean(key, accepted)
            problems.append(
                f"`optim_args: {{{key}: {value}}}` is no option of `optimizer: {name}`.{hint} It has: {', '.join(sorted(accepted))}."
            )
            continue
        default = accepted[key]
        if isinstance(default, torch.dtype) and isinstance(value, str):
            value = getattr(torch, value, value)
        wanted = _wanted(key, default)
        if wanted and not _fits(default, value, CHOICES.get(key)):
            problems.append(f"`optim_args: {{{key}: {value}}}` of `optimizer: {name}` must be {wanted}.")
        checked[key] = value
    if problems:
        raise ConfigError(problems)
    return checked


def _wanted(key: str, default: Any) -> str:
    if key in CHOICES:
        return f"one of {', '.join(CHOICES[key])}"
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, int | float):
        return "a number"
    if isinstance(default, tuple):
        return f"{len(default)} numbers, such as {list(default)}"
    return "a dtype of torch, such as float32" if isinstance(default, torch.dtype) else ""


def _fits(default: Any, value: Any, choices: tuple[str, ...] | None) -> bool:
    if choices:
        return value in choices
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, tuple) and len(value) == len(default) and all(_fits(0.0, v, None) for v in value)
    return isinstance(value, type(default))
