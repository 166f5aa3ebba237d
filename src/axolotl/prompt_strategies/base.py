"""module for base dataset transform strategies

A transform strategy changes rows without tokenizing them, as preference methods need it. A module of a package such as
`axolotl.prompt_strategies.dpo` has one function per format; called with the config it gives the transform.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from axolotl.exceptions import ConfigError

DEFAULT_FUNCTION = "default"


def load(strategy: str, cfg: Any, module_base: str | None = None, **kwargs: Any) -> Any:
    """What the function that a `type:` names makes of the config.

    Args:
        strategy: `module.function` inside `module_base`; `module` for its function `default`; or a python path of the user's.
        cfg: the whole config, handed to the function.
        module_base: package of the strategies, such as `axolotl.prompt_strategies.dpo`.
        kwargs: handed to the function too, such as `dataset_idx`.

    Raises:
        ConfigError: no module has that name, or it has no such function.
    """
    return find_function(strategy, module_base)(cfg, **kwargs)


def find_function(strategy: str, module_base: str | None = None) -> Callable[..., Any]:
    """The function that `strategy` names; see `load`."""
    bases = [f"{module_base}.", ""] if module_base else [""]
    path, _, name = strategy.rpartition(".")
    for base in bases:
        for module_path, function in ((path, name), (strategy, DEFAULT_FUNCTION)):
            module = find_module(base + module_path) if module_path else None
            found = getattr(module, function, None)
            if callable(found):
                return found
    modules = [module for base in bases for module in [find_module(base + (path or strategy))] if module is not None]
    known = sorted({found for module in modules for found in _functions(module)})
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    where = f" `{modules[0].__name__}` has the functions {', '.join(f'`{one}`' for one in known)}." if known else ""
    hint = f" Did you mean {' or '.join(f'`{path or strategy}.{one}`' for one in near)}?" if near and path else ""
    raise ConfigError(
        f"`type: {strategy}` names no function{f' of {module_base}' if module_base else ''} and no python path.{hint}{where}"
    )


def _functions(module: ModuleType) -> list[str]:
    found = inspect.getmembers(module, inspect.isfunction)
    return [name for name, function in found if function.__module__ == module.__name__ and not name.startswith("_")]


def find_module(path: str) -> ModuleType | None:
    """The module at `path`; None when there is none. An error inside an existing module is not hidden."""
    if not all(part.isidentifier() for part in path.split(".")):
        return None
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is not None and (path == error.name or path.startswith(f"{error.name}.")):
            return None
        raise
