"""What pydantic found wrong, in the user's words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from axolotl.utils.schemas.unknown import nearest

# Pydantic's kind of error -> what was wanted. `{...}` are filled from the error's context.
WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "not_a_number": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "zero_byte": "text without a zero byte",
    "unquoted_number": "text; put the number in quotes",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:.10g}",
    "string_pattern_mismatch": "text that matches {pattern}",
}

# Longer lists of words are not printed whole.
MANY_WORDS = 12


def explain(exc: ValidationError, data: Any) -> list[str]:
    """One line per wrong value: the dotted key, the value, what is expected, and the nearest word when misspelt.

    Args:
        exc: raised by `model_validate(data)`.
        data: what was validated.

    Returns:
        Lines such as `` `datasets.0.train_on_eos: lst` cannot be used: expected all, turn, last or none. Did you mean `last`? ``
    """
    found: dict[tuple[Any, ...], list[ErrorDetails]] = {}
    for error in exc.errors(include_url=False):
        found.setdefault(key_path(error, data), []).append(error)
    # A value with several allowed shapes fails in each of them. Where one of them went deeper, it is the one meant.
    outer = {path[:length] for path in found for length in range(len(path))}
    return [line for path, errors in found.items() if path not in outer for line in _lines(path, errors)]


def key_path(error: ErrorDetails, data: Any) -> tuple[Any, ...]:
    """The part of the error's location that is in the data; pydantic also puts names of types in it."""
    path: list[Any] = []
    for step in error["loc"]:
        if _has(data, step):
            data = data[step]
        elif error["type"] == "missing" and step == error["loc"][-1]:
            data = None
        else:
            continue
        path.append(step)
    return tuple(path)


def _has(data: Any, step: Any) -> bool:
    if isinstance(data, dict):
        return step in data
    return isinstance(data, list | tuple) and isinstance(step, int) and step < len(data)


def _lines(path: tuple[Any, ...], errors: Sequence[ErrorDetails]) -> list[str]:
    key = ".".join(str(step) for step in path)
    if any(error["type"] == "missing" for error in errors):
        return [f"`{key}` is missing. Write `{path[-1]}: ...`."]
    own_words = [_own_message(error) for error in errors if error["type"] in ("value_error", "assertion_error")]
    if own_words:
        where = f"`{key}`: " if key else ""
        return [f"{where}{line}" for words in own_words for line in words.splitlines()]
    value = errors[0]["input"]
    words = [word for error in errors for word in _allowed_words(error)]
    wanted = [_wanted(error) for error in errors if not _allowed_words(error)]
    near = nearest(value, words) if isinstance(value, str) else None
    if len(words) > MANY_WORDS:
        words, wanted = [f"one of {len(words)} names, such as {words[0]} (docs/config-reference.md lists them)"], []
    expected = _or([*dict.fromkeys(words), *dict.fromkeys(wanted)])
    hint = f" Did you mean `{near}`?" if near else ""
    return [f"`{key}: {_short(value)}` cannot be used: expected {expected}.{hint}"]


def _own_message(error: ErrorDetails) -> str:
    inner = error.get("ctx", {}).get("error")
    return str(inner) if inner is not None else error["msg"].removeprefix("Value error, ")


def _allowed_words(error: ErrorDetails) -> list[str]:
    if error["type"] not in ("literal_error", "enum", "unknown_name"):
        return []
    expected = str(error.get("ctx", {}).get("expected", ""))
    return [word.strip().strip("'") for word in expected.replace(" or ", ", ").split(",")]


def _wanted(error: ErrorDetails) -> str:
    template = WANTED.get(error["type"])
    return template.format(**error.get("ctx", {})) if template else error["msg"][0].lower() + error["msg"][1:]


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # as YAML writes it
    text = repr(value) if isinstance(value, list | dict) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
