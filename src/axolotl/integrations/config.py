"""The config schema with the keys of the registered plugins in it."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from pydantic import BaseModel, create_model

from axolotl.exceptions import ConfigError
from axolotl.integrations.base import PluginManager
from axolotl.utils.schemas.config import AxolotlConfigWCapabilities, AxolotlInputConfig


def merge_input_args() -> tuple[type[AxolotlConfigWCapabilities], type[AxolotlInputConfig]]:
    """Both config models, each extended by the argument models of the registered plugins.

    Returns:
        `(AxolotlConfigWCapabilities, AxolotlInputConfig)`; the plain ones when no plugin brings arguments.

    Raises:
        ConfigError: a plugin names an argument model that does not exist, or is none.
    """
    models = tuple(dict.fromkeys(_argument_model(answer) for answer in PluginManager.get_instance().get_input_args()))
    return _merged_models(models)


@functools.lru_cache(maxsize=8)
def _merged_models(models: tuple[type[BaseModel], ...]) -> tuple[Any, Any]:
    if not models:
        return AxolotlConfigWCapabilities, AxolotlInputConfig
    return (
        create_model("AxolotlConfigWCapabilities", __base__=(AxolotlConfigWCapabilities, *models)),
        create_model("AxolotlInputConfig", __base__=(AxolotlInputConfig, *models)),
    )


def merge_training_args() -> tuple[type, ...]:
    """The training argument dataclasses of the registered plugins, to be mixed into the training arguments.

    Raises:
        ConfigError: a plugin names a class that does not exist.
    """
    answers = PluginManager.get_instance().get_training_args_mixin()
    return tuple(dict.fromkeys(_resolve_class(answer, "get_training_args_mixin") for answer in answers))


def _argument_model(answer: str | type) -> type[BaseModel]:
    model = _resolve_class(answer, "get_input_args")
    if not issubclass(model, BaseModel):
        raise ConfigError(f"`get_input_args` of a plugin answered {answer!r}, which is not a pydantic model.")
    return model


def _resolve_class(answer: str | type, hook: str) -> type:
    """A class, given itself or its dotted path."""
    if isinstance(answer, type):
        return answer
    module_name, _, class_name = str(answer).rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as err:
        raise ConfigError(f"`{hook}` of a plugin answered {answer!r}, which cannot be imported: {err}") from err
    if not isinstance(found, type):
        raise ConfigError(f"`{hook}` of a plugin answered {answer!r}, which is not a class.")
    return found
