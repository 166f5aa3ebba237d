"""`validate_config`: every problem of a config at once, or the checked config."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from axolotl._not_built import not_built_problems
from axolotl.exceptions import ConfigError
from axolotl.integrations.base import PluginError, PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.config import FIELDS_ONLY, AxolotlConfigWCapabilities, AxolotlInputConfig
from axolotl.utils.schemas.deprecated import apply_renames
from axolotl.utils.schemas.errors import explain
from axolotl.utils.schemas.unknown import unknown_keys
from axolotl.utils.schemas.validation import run_checks

LOG = get_logger(__name__)

# What `normalize_config` derives from keys that may not stand beside the result.
DERIVED = ("batch_size", "save_steps", "save_strategy", "eval_steps", "eval_strategy")


def prepare_plugins(cfg: DictDefault) -> None:
    """Load the classes under `plugins:` and hand each the config as written.

    Raises:
        ConfigError: a class cannot be imported or is not a plugin; with it, whatever else is wrong with the config.
    """
    manager = PluginManager.get_instance()
    names = _plugin_names(cfg)
    # One process may run several configs, one after another: each with its own plugins only.
    manager.plugins = {name: plugin for name, plugin in manager.plugins.items() if name in names}
    try:
        for name in names:
            manager.register(name)
    except PluginError:
        validate_config(cfg)
        raise
    manager.cfg = cfg
    for plugin in manager.plugins.values():
        plugin.register(cfg)


def validate_config(
    cfg: Mapping[str, Any],
    capabilities: Mapping[str, Any] | None = None,
    env_capabilities: Mapping[str, Any] | None = None,
) -> DictDefault:
    """Check a config and fill what its keys imply.

    Args:
        cfg: the config as written. Left as it is.
        capabilities: facts of this machine (`axolotl.utils.environment.machine_capabilities`). Rules about the machine
            are skipped without them.
        env_capabilities: facts of this environment (`axolotl.utils.environment.env_capabilities`), likewise.

    Returns:
        A new config: keys renamed, values typed, defaults filled in, keys that are None left out.

    Raises:
        ConfigError: with every problem found.
    """
    written = DictDefault(copy.deepcopy(dict(cfg)))
    for name, facts in (("capabilities", capabilities), ("env_capabilities", env_capabilities)):
        if facts is not None:
            written[name] = facts
    try:
        return _validated(written)
    except ConfigError as err:
        PluginManager.get_instance().on_config_validation_error(written, err)
        raise


def _validated(cfg: DictDefault) -> DictDefault:
    """`cfg`, which is changed, brought to today's names, typed, checked and completed."""
    _forget_derived(cfg)
    _expand_home(cfg)
    problems = apply_renames(cfg)
    problems += _plugin_problems(cfg)
    models = merge_input_args() if _plugin_names(cfg) else (AxolotlConfigWCapabilities, AxolotlInputConfig)
    model = models[0] if cfg.capabilities or cfg.env_capabilities else models[1]
    unknown, warnings = unknown_keys(cfg, models[0])
    for warning in warnings:
        LOG.warning(warning)
    problems += unknown

    checked, refused, field_problems = _typed(cfg, model)
    problems += not_built_problems(_written(checked, cfg, refused, exclude_defaults=True))
    problems += field_problems
    typed = _written(checked, cfg, refused)
    problems += run_checks(typed, refused)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    # What the checks filled in is typed too, and what nobody wrote gets its default.
    checked = model.model_validate(typed.to_dict(), context=FIELDS_ONLY)
    result = DictDefault(checked.model_dump(exclude_none=True))
    # Facts of the machine have no defaults: what is not known stays unknown.
    for key in ("capabilities", "env_capabilities"):
        result.pop(key, None)
        if typed[key]:
            result[key] = {name: value for name, value in typed[key].items() if value is not None}
    return result


def _expand_home(cfg: DictDefault) -> None:
    """Let `~/` begin any path at the top of a config, as in a shell. Left as it is, it would name a folder `~` here."""
    for key, value in cfg.items():
        if isinstance(value, str) and value.startswith("~/"):
            cfg[key] = os.path.expanduser(value)


def _forget_derived(cfg: DictDefault) -> None:
    """Let a config that was normalized before, such as one saved by a run, be validated as it was written."""
    if not isinstance(cfg.resolution, list):
        return
    cfg.resolution = [entry for entry in cfg.resolution if isinstance(entry, dict) and "key" in entry]
    noted = [entry["key"] for entry in cfg.resolution]
    for key in DERIVED:
        if key in noted:
            cfg.pop(key, None)


def _plugin_names(cfg: DictDefault) -> list[str]:
    """What can be read of `plugins:`; the rest is refused with the fields."""
    return [name for name in cfg.plugins if isinstance(name, str)] if isinstance(cfg.plugins, list | tuple) else []


def _plugin_problems(cfg: DictDefault) -> list[str]:
    """Load the plugins that are not loaded yet, so that their keys are known."""
    problems = []
    for name in _plugin_names(cfg):
        try:
            PluginManager.get_instance().register(name)
        except PluginError as err:
            problems += err.problems
    return problems


def _typed(cfg: DictDefault, model: type[BaseModel]) -> tuple[BaseModel | None, set[str], list[str]]:
    """Read the fields of a config, as far as they can be read.

    Returns:
        The fields whose values are of the right type (None when nothing can be read), the keys whose values were
        refused, and a message for each refusal.
    """
    values = cfg.to_dict()
    try:
        return model.model_validate(values, context=FIELDS_ONLY), set(), []
    except ValidationError as err:
        error = err
    refused = {str(row["loc"][0]) for row in error.errors(include_url=False, include_context=False) if row["loc"]}
    rest = {key: value for key, value in values.items() if key not in refused}
    # Something must stand in the place of a key that must be written; `_written` leaves it out again.
    required = {name: "0" for name, field in model.model_fields.items() if field.is_required() and name not in rest}
    try:
        checked = model.model_validate({**rest, **required}, context=FIELDS_ONLY)
    except ValidationError:
        checked = None
    return checked, refused, explain(error, cfg)


def _written(
    checked: BaseModel | None, cfg: DictDefault, refused: set[str], *, exclude_defaults: bool = False
) -> DictDefault:
    """The typed values of the keys that somebody wrote, without those that were refused."""
    values = cfg if checked is None else checked.model_dump(exclude_unset=True, exclude_defaults=exclude_defaults)
    return DictDefault({key: value for key, value in values.items() if key not in refused})
