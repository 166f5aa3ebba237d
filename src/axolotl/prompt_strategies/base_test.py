from __future__ import annotations

import sys
import types

import pytest

from axolotl.exceptions import ConfigError
from axolotl.prompt_strategies.base import load


@pytest.fixture
def package(monkeypatch):
    """A package `recipes` with a module `chatml` of two formats."""

    def default(cfg, **kwargs):
        return "default", cfg, kwargs

    def intel(cfg, **kwargs):
        return "intel", cfg, kwargs

    recipes, chatml = types.ModuleType("recipes"), types.ModuleType("recipes.chatml")
    recipes.__path__ = []
    for function in (default, intel):
        function.__module__ = "recipes.chatml"
        setattr(chatml, function.__name__, function)
    monkeypatch.setitem(sys.modules, "recipes", recipes)
    monkeypatch.setitem(sys.modules, "recipes.chatml", chatml)


@pytest.mark.parametrize(
    "strategy, base, found",
    [
        ("chatml.intel", "recipes", "intel"),
        ("chatml", "recipes", "default"),
        ("recipes.chatml.intel", "axolotl.prompt_strategies", "intel"),
        ("recipes.chatml", None, "default"),
    ],
)
def test_names(package, strategy, base, found):
    assert load(strategy, "cfg", base, dataset_idx=3) == (found, "cfg", {"dataset_idx": 3})


@pytest.mark.parametrize(
    "strategy, message",
    [
        ("chatml.intell", "Did you mean `chatml.intel`"),
        ("chatmll", "names no function of recipes"),
        ("nothing.here", "no python path"),
    ],
)
def test_unknown_names(package, strategy, message):
    with pytest.raises(ConfigError, match=message):
        load(strategy, {}, "recipes")
