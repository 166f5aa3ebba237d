"""Utilities for handling sweeps over configs for axolotl train CLI command"""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

from axolotl.exceptions import ConfigError

# The key of a sweep file whose entries vary together instead of with each other.
PAIRED = "_"

_SHUFFLE_SEED = 42


def generate_sweep_configs(base_config: dict[str, Any], sweeps_config: dict[str, Any]) -> list[dict[str, Any]]:
    """Generates all possible configurations by applying sweeps to the base config.

    Args:
        base_config: the config that every run starts from.
        sweeps_config: key -> list of values; a key may be dotted (`trl.beta`). `_` is a list of mappings, each of which is
            set as a whole.

    Returns:
        One config per combination, in an order that is shuffled the same way every time.

    Example:
        sweeps_config = {
            'learning_rate': [0.1, 0.01],
            '_': [
                {'load_in_8bit': True, 'adapter': 'lora'},
                {'load_in_4bit': True, 'adapter': 'qlora'}
            ]
        }
    """
    check_sweep(sweeps_config)
    axes = [[{key: value} for value in values] for key, values in sweeps_config.items() if key != PAIRED]
    if sweeps_config.get(PAIRED):
        axes.append(sweeps_config[PAIRED])
    configs = []
    for combination in itertools.product(*axes):
        config = copy.deepcopy(base_config)
        for choice in combination:
            for key, value in choice.items():
                _set_key(config, key, copy.deepcopy(value))
        configs.append(config)
    random.Random(_SHUFFLE_SEED).shuffle(configs)
    return configs


def check_sweep(sweeps_config: Any) -> None:
    """Raise a `ConfigError` unless `sweeps_config` has the form that `generate_sweep_configs` describes."""
    if not isinstance(sweeps_config, dict) or not sweeps_config:
        raise ConfigError("A sweep is a mapping of keys to lists of values, such as `learning_rate: [0.0001, 0.0002]`.")
    for key, values in sweeps_config.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"Sweep: `{key}: {values}` is no list of values. Write `{key}: [{values}]`.")
        if key == PAIRED and not all(isinstance(value, dict) for value in values):
            raise ConfigError("Sweep: every entry of `_` must be a mapping of keys to the values that go together.")


def swept_keys(sweeps_config: dict[str, Any]) -> set[str]:
    """The dotted keys that a sweep sets."""
    paired = {key for choice in sweeps_config.get(PAIRED, []) for key in choice}
    return paired | {key for key in sweeps_config if key != PAIRED}


def _set_key(config: dict[str, Any], dotted: str, value: Any) -> None:
    if dotted in config:
        config[dotted] = value
        return
    *parents, last = dotted.split(".")
    place = config
    for parent in parents:
        if not isinstance(place.get(parent), dict):
            place[parent] = {}
        place = place[parent]
    place[last] = value
