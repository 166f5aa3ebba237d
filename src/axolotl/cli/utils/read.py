"""The text of a config becomes a dict, or an error that points at the line.

YAML is read with the safe loader. JSON may carry `//` comments and may be the request body that orchestration services
post (`{"input": {"args": {...}, "credentials": {...}}}`); its credentials go to the environment and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from axolotl.exceptions import ConfigError
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

# Field of `input.credentials` -> environment variable that the libraries read.
CREDENTIALS = {"hf_token": "HF_TOKEN", "wandb_api_key": "WANDB_API_KEY"}

MAX_VALUES = 100_000

_JSON_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)


def parse_config(content: bytes, source: str) -> dict[str, Any]:
    """The mapping that a config file holds.

    Args:
        content: the bytes of the file.
        source: what errors call it, such as its path.

    Raises:
        ConfigError: not text, not YAML or JSON, a key written twice in JSON, or not a mapping with text keys.
    """
    text = decode_text(content, source)
    data = parse_mapping_text(text, source)
    if data is None:
        raise ConfigError(f"{source} is empty. It must hold keys and values, such as `base_model: org/name`.")
    if not isinstance(data, dict):
        raise ConfigError(
            f"{source} holds {_kind_of(data)}, but a config is a mapping of keys to values, such as `base_model: org/name`."
        )
    for key in data:
        if not isinstance(key, str):
            raise ConfigError(
                f"{source}: the key `{key}` is read by YAML as {_kind_of(key)}, but keys are text. Put it in quotes."
            )
    return unwrap_request_body(data, source)


def decode_text(content: bytes, source: str) -> str:
    if b"\0" in content:
        raise ConfigError(f"{source} is a binary file. A config is a text file in YAML or JSON.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{source}: line {line} is not UTF-8 text. Save the file as UTF-8.") from None


def parse_mapping_text(text: str, source: str) -> Any:
    """JSON when the text starts with a brace and reads as JSON, or is named `.json`; else YAML."""
    if source.endswith(".json"):
        return _parse_json(text, source)
    if text.lstrip().startswith("{"):
        try:
            return _parse_json(text, source)
        except ConfigError:
            # `{a: b}` is YAML too. When both readings fail, the one that the file looks more like reports.
            if not re.match(r'\s*\{\s*(?://[^\n]*\s*)*"', text):
                return parse_yaml(text, source)
            raise
    return parse_yaml(text, source)


def _parse_json(text: str, source: str) -> Any:
    def without_comment(match: re.Match[str]) -> str:
        found = match.group()
        # A comment becomes blanks, so that line and column of an error stay those of the file.
        return found if found.startswith('"') else re.sub(r"[^\n]", " ", found)

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key, value in pairs:
            if key in mapping:
                raise ConfigError(f"{source}: the key `{key}` is written twice. Keep one.")
            mapping[key] = value
        return mapping

    try:
        return json.loads(_JSON_STRING_OR_COMMENT.sub(without_comment, text), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{source} is not valid JSON: {error.msg}\n{_point_at(text, error.lineno - 1, error.colno - 1)}"
        ) from None


class _TellsDuplicateKeys(SafeConstructor):
    """A warning for a key written twice, of which YAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            key, line = key_node.value, key_node.start_mark.line
            if key in seen:
                LOG.warning(
                    f"The key `{key}` is written twice: on line {seen[key] + 1} and again on line {line + 1}. "
                    "The last one counts; remove the other."
                )
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


class _Loader(_TellsDuplicateKeys, yaml.SafeLoader):
    """The safe loader."""


LOADERS: tuple[type, ...] = (_Loader,)
"""Readers of YAML. The last of them reads every text in words of its own; one before it is for texts without an error."""

if yaml.__with_libyaml__:
    from yaml.composer import Composer

    class _FastLoader(_TellsDuplicateKeys, Composer, yaml.CSafeLoader):
        """The safe loader over the parser in C: four times as fast. That of C puts deep nesting together without a limit,
        and crashes; the composer in Python raises."""

        def __init__(self, text: str):
            yaml.CSafeLoader.__init__(self, text)
            Composer.__init__(self)

    LOADERS = (_FastLoader, _Loader)


def parse_yaml(text: str, source: str) -> Any:
    """What a YAML text holds; `None` when it is empty."""
    try:
        loaded = _load(text)
        _check_expanded_size(loaded, source)
        return loaded
    except ConfigError:
        raise  # it is a ValueError, too
    except yaml.MarkedYAMLError as error:
        if error.problem == "but found another document":
            raise ConfigError(
                f"{source} holds several YAML documents, separated by `---`. A config is one: keep one, or write several files."
            ) from None
        mark = error.problem_mark or error.context_mark
        where = f"\n{_point_at(text, mark.line, mark.column)}" if mark else ""
        raise ConfigError(f"{source} is not valid YAML: {error.problem or error.context}.{where}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    except (ValueError, TypeError) as error:
        # The safe loader reads some scalars eagerly: `2024-13-45` is a date that no calendar has.
        raise ConfigError(f"{source} is not valid YAML: {error}. Put the value in quotes if it is text.") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply to be a config.") from None


def _load(text: str) -> Any:
    *fast, careful = LOADERS
    for loader in fast:
        with contextlib.suppress(yaml.YAMLError):
            return yaml.load(text, loader)
    return yaml.load(text, careful)


def _check_expanded_size(loaded: Any, source: str) -> None:
    """Refuse aliases (`*name`) nested so that a small text stands for more values than fit in memory."""
    sizes: dict[int, int] = {}

    def size_of(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 1
        if sizes.get(id(value)) == 0:
            raise ConfigError(
                f"{source}: an alias (`*name`) stands inside the value that it names. Write the value out."
            )
        if id(value) not in sizes:
            sizes[id(value)] = 0  # being counted
            children = value.values() if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(map(size_of, children))
        return sizes[id(value)]

    if size_of(loaded) > MAX_VALUES:
        raise ConfigError(
            f"{source} stands for more than {MAX_VALUES:,} values once its aliases (`*name`) are filled in, which no config is."
        )


def unwrap_request_body(data: dict[str, Any], source: str) -> dict[str, Any]:
    """The config inside a request body, with its credentials moved to the environment; any other mapping as it is."""
    body = data.get("input")
    if not (isinstance(body, dict) and "args" in body):
        return data
    if not isinstance(body["args"], dict):
        raise ConfigError(
            f"{source}: `input.args` holds {_kind_of(body['args'])}, but it is the config: a mapping of keys to values."
        )
    credentials = body.get("credentials") or {}
    if not isinstance(credentials, dict):
        raise ConfigError(f"{source}: `input.credentials` must hold {', '.join(CREDENTIALS)}.")
    for field, value in credentials.items():
        if field not in CREDENTIALS:
            raise ConfigError(f"{source}: unknown `input.credentials.{field}`. Known: {', '.join(CREDENTIALS)}.")
        if value:
            os.environ.setdefault(CREDENTIALS[field], str(value))
    if unused := sorted(set(body) - {"args", "credentials"}):
        LOG.info("%s: `input.%s` does not belong to the config and is not used.", source, "`, `input.".join(unused))
    return body["args"]


def _point_at(text: str, line: int, column: int) -> str:
    """The line of an error with a caret under the column."""
    lines = text.splitlines() or [""]
    line = min(line, len(lines) - 1)
    shown = lines[line].replace("\t", " ")
    start = max(0, column - 100)
    return f"  line {line + 1}: {shown[start : start + 140]}\n{' ' * (len(f'  line {line + 1}: ') + column - start)}^"


def _kind_of(value: Any) -> str:
    kinds: dict[type, str] = {list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a {type(value).__name__}")
