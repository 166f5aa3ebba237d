"""`DictDefault`: the mapping that carries a config through the program. Missing keys read as `None`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any


class DictDefault(dict):
    """A dict whose keys are also attributes and whose missing keys read as `None`.

    Mappings stored in it, also inside lists and tuples, become `DictDefault` themselves. `a | b` keeps the values of `a`
    and adds what only `b` has; `update` merges nested mappings.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        for arg in args:
            if arg is None:
                continue
            items: Iterable[tuple[Any, Any]] = arg.items() if isinstance(arg, Mapping) else arg
            for key, value in items:
                self[key] = value
        for key, value in kwargs.items():
            self[key] = value

    @classmethod
    def _wrap(cls, value: Any) -> Any:
        if isinstance(value, DictDefault):
            return value
        if isinstance(value, dict):
            return cls(value)
        if type(value) in (list, tuple):
            return type(value)(cls._wrap(item) for item in value)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, self._wrap(value))

    def __missing__(self, key: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):
            raise AttributeError(f"'{name}' is a method of {type(self).__name__}; write cfg['{name}'] = ... instead")
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __or__(self, other: Any) -> DictDefault:
        if not isinstance(other, Mapping):
            return NotImplemented
        merged = type(self)(other)
        merged.update(self)
        return merged

    def __ror__(self, other: Any) -> DictDefault:
        if not isinstance(other, Mapping):
            return NotImplemented
        merged = type(self)(self)
        merged.update(other)
        return merged

    def __ior__(self, other: Any) -> DictDefault:
        self.update(other)
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Merge mappings into this one; a nested mapping merges key by key instead of replacing."""
        for key, value in DictDefault(*args, **kwargs).items():
            if isinstance(self.get(key), DictDefault) and isinstance(value, DictDefault):
                self[key].update(value)
            else:
                self[key] = value

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def copy(self) -> DictDefault:
        return type(self)(dict(self))

    def __copy__(self) -> DictDefault:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> DictDefault:
        new = type(self)()
        memo[id(self)] = new
        for key, value in self.items():
            new[copy.deepcopy(key, memo)] = copy.deepcopy(value, memo)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (), None, None, iter(self.items())

    def to_dict(self) -> dict[Any, Any]:
        """A plain dict of plain dicts, lists and tuples."""

        def plain(value: Any) -> Any:
            if isinstance(value, DictDefault):
                return value.to_dict()
            if type(value) in (list, tuple):
                return type(value)(plain(item) for item in value)
            return value

        return {key: plain(value) for key, value in self.items()}


def remove_none_values(obj: Any) -> Any:
    """`obj` without the keys and list items that are `None`, at every depth.

    Arrow gives every struct of a column the same fields, so a key that one row lacks comes back as `None`.
    """
    if hasattr(obj, "items"):
        return {key: remove_none_values(value) for key, value in obj.items() if value is not None}
    if isinstance(obj, list):
        return [remove_none_values(item) for item in obj if item is not None]
    return obj


def note_choice(cfg: DictDefault, key: str, value: Any, reason: str) -> None:
    """Record a choice made for the user, to be printed by `train` and `plan`.

    Args:
        cfg: the config; `cfg["resolution"]` grows by one entry, or the entry of the same key is replaced.
        key: the key as the user would write it.
        value: what it was resolved to.
        reason: one clause that says why.
    """
    kept = [entry for entry in cfg.get("resolution") or [] if entry["key"] != key]
    cfg["resolution"] = [*kept, {"key": key, "value": value, "reason": reason}]
