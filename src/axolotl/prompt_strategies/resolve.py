"""Which strategy a `type:` names.

In this order: a mapping is `user_defined`; a module of this package; a python path of the user's; the table of base
types. A last part that starts with `load_` selects that function of the module instead of `load`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from axolotl import prompt_tokenizers as strategies
from axolotl import prompters
from axolotl.exceptions import ConfigError, did_you_mean
from axolotl.prompt_strategies.base import find_module
from axolotl.utils.dict import DictDefault

PACKAGE = "axolotl.prompt_strategies"

BASE_TYPES: dict[str, tuple[type, type]] = {
    "alpaca": (strategies.AlpacaPromptTokenizingStrategy, prompters.AlpacaPrompter),
    "explainchoice": (
        strategies.AlpacaMultipleChoicePromptTokenizingStrategy,
        prompters.MultipleChoiceExplainPrompter,
    ),
    "concisechoice": (
        strategies.AlpacaMultipleChoicePromptTokenizingStrategy,
        prompters.MultipleChoiceConcisePrompter,
    ),
    "summarizetldr": (strategies.SummarizeTLDRPromptTokenizingStrategy, prompters.SummarizeTLDRPrompter),
    "jeopardy": (strategies.JeopardyPromptTokenizingStrategy, prompters.JeopardyPrompter),
    "oasst": (strategies.OpenAssistantPromptTokenizingStrategy, prompters.AlpacaPrompter),
    "gpteacher": (strategies.GPTeacherPromptTokenizingStrategy, prompters.GPTeacherPrompter),
    "reflection": (strategies.AlpacaReflectionPTStrategy, prompters.ReflectAlpacaPrompter),
}
"""Base type -> its strategy and prompter. Written `type` or `type:style`."""

NOT_TYPES = frozenset({"base", "mistral_chat", "resolve"})
"""Modules of this package that are no dataset types."""


def load(
    strategy: str | Mapping[str, Any],
    tokenizer,
    cfg: DictDefault,
    ds_cfg: Mapping[str, Any] | None = None,
    processor=None,
):
    """The strategy that a `type:` names.

    Args:
        strategy: the `type:` of a dataset.
        tokenizer: the tokenizer of the model.
        cfg: the whole config; `train_on_inputs` and `sequence_len` are read.
        ds_cfg: the config of this dataset; for `user_defined`, also the mapping under its `type:`.
        processor: the processor of a multimodal model.

    Raises:
        ConfigError: nothing has that name, or the module has no such function.
    """
    if isinstance(strategy, Mapping):
        user_defined = importlib.import_module(f"{PACKAGE}.user_defined")
        return user_defined.load(tokenizer, cfg, ds_cfg=strategy)
    function = _function(strategy)
    if function is not None:
        return _call(function, tokenizer, cfg, ds_cfg, processor)
    base, _, style = strategy.partition(":")
    if base in BASE_TYPES:
        strategy_class, prompter_class = BASE_TYPES[base]
        prompter = prompter_class(style or None)
        return strategy_class(prompter, tokenizer, cfg.train_on_inputs, cfg.sequence_len)
    raise ConfigError(_unknown(strategy))


def known_types() -> list[str]:
    """Every `type:` that ships with this package."""
    package = importlib.import_module(PACKAGE)
    modules = {
        info.name
        for info in pkgutil.iter_modules(package.__path__)
        if not info.ispkg and not info.name.endswith("_test")
    }
    return sorted((modules - NOT_TYPES) | set(BASE_TYPES))


def _function(strategy: str) -> Callable | None:
    """The load function that `strategy` names, or None when no module has that name."""
    path, _, last = strategy.rpartition(".")
    name, path = (last, path) if path and last.startswith("load_") else ("load", strategy)
    if path in NOT_TYPES:
        return None
    module = find_module(f"{PACKAGE}.{path}") or ("." in strategy and find_module(path)) or None
    if module is None:
        return None
    if not hasattr(module, name):
        functions = sorted(key for key in vars(module) if key == "load" or key.startswith("load_"))
        raise ConfigError(
            f"`type: {strategy}`: the module `{module.__name__}` has no function `{name}`"
            + (f"; it has {', '.join(f'`{f}`' for f in functions)}." if functions else ".")
            + " Define `load(tokenizer, cfg, ds_cfg=None)` there."
        )
    return getattr(module, name)


def _call(function: Callable, tokenizer, cfg: DictDefault, ds_cfg: Any, processor):
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    kwargs = {}
    if takes_any or "ds_cfg" in parameters:
        kwargs["ds_cfg"] = ds_cfg
    if "processor" in parameters or (takes_any and processor is not None):
        kwargs["processor"] = processor
    return function(tokenizer, cfg, **kwargs)


def _unknown(strategy: str) -> str:
    known = known_types()
    hint = did_you_mean(strategy.partition(":")[0].partition(".")[0], known, n=3, cutoff=0.5)
    return (
        f"`type: {strategy}` names no dataset type and no importable module.{hint} "
        f"The types are: {', '.join(known)}; or write the python path of a module with `load(tokenizer, cfg, ds_cfg=None)`."
    )
