"""From the messages of a row, in whatever shape datasets keep them, to the turns that a chat template reads.

A turn is a dict with `role`, mostly `content`, and whatever else the template reads. Three keys are for the labels only
and are never given to the template: see `LABEL_KEYS`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
import jinja2.nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

from axolotl.exceptions import DatasetError
from axolotl.utils.dict import remove_none_values

Turn = dict[str, Any]

TRAINING = "training"
TRAINING_DETAIL = "training_detail"
THINKING_DETAIL = "thinking_training_detail"
LABEL_KEYS = frozenset({TRAINING, TRAINING_DETAIL, THINKING_DETAIL})
"""Keys of a turn that decide on its labels: whether it is learnt, and which characters of content and reasoning are."""

DEFAULT_ROLES: dict[str, str] = {
    "human": "user",
    "user": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
}

_THINKING_TAGS = (
    ("<think>", "</think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_SOLUTION_TAGS = ("<|begin_of_solution|>", "<|end_of_solution|>")
_WORDS = {
    type(None): "null",
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    dict: "a mapping",
    list: "a list",
}
_PART_TEXT_KEYS = ("text", "content", "value")
_PART_TRAIN_KEYS = ("train", "weight")


@functools.lru_cache(maxsize=64)
def names_read_by(*templates: str) -> frozenset[str]:
    """Every name that one of the templates reads as an attribute, as a key, or asks for with `in`."""
    names: set[str] = set()
    for template in set(templates):
        tree = _compile_jinja_template(template).environment.parse(template)
        names |= {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
        names |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return frozenset(names)


@functools.lru_cache(maxsize=64)
def variables_read_by(template: str) -> frozenset[str]:
    """Every variable that a template reads, such as `messages` and `tools`, and those that it sets itself."""
    tree = _compile_jinja_template(template).environment.parse(template)
    return frozenset(node.name for node in tree.find_all(jinja2.nodes.Name))


def read_messages(row: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """The messages of a row: a list, or the JSON of one.

    Raises:
        DatasetError: there are none, or they are something else.
    """
    if field not in row:
        lists = [name for name, value in row.items() if isinstance(value, list) and name != "tools"]
        hint = f"`field_messages: {lists[0]}`" if len(lists) == 1 else "the right one as `field_messages`"
        raise DatasetError(
            f"The row has no field `{field}`; its fields are {', '.join(f'`{name}`' for name in row)}. Write {hint}."
        )
    messages = row[field]
    if messages is None:
        raise DatasetError(f"Messages is null. Please check `field_messages`. It is `{field}` here.")
    if isinstance(messages, str):
        messages = _from_json(messages, f"the field `{field}`")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise DatasetError(
            f"Unknown messages format: {_kind(messages)}. The field `{field}` must hold a list of messages, each with a "
            "role and a content, or the JSON text of such a list."
        )
    if not messages:
        raise DatasetError(f"The field `{field}` holds no message. Leave the row out.")
    return messages


def read_tools(row: Mapping[str, Any], field: str | None) -> list[dict[str, Any]] | None:
    """The tools of a row: a list, or the JSON of one; `parameters` may be JSON text too.

    Raises:
        DatasetError: they are something else.
    """
    tools = row.get(field) if field else None
    if isinstance(tools, str):
        tools = _from_json(tools, f"the field `{field}`") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DatasetError(
            f"Unknown tools format: {_kind(tools)}. The field `{field}` must hold a list of JSON schemas, or its JSON text."
        )
    tools = [remove_none_values(dict(tool)) for tool in tools]
    for tool in tools:
        function = tool["function"] if isinstance(tool.get("function"), dict) else tool
        if isinstance(function.get("parameters"), str):
            function["parameters"] = _from_json(
                function["parameters"], f"`parameters` of the tool `{function.get('name')}` in `{field}`"
            )
    return tools


def read_turn(
    message: Mapping[str, Any], mappings: Mapping[str, str], roles: Mapping[str, str], template_names: Iterable[str]
) -> Turn:
    """A message as the template wants it.

    Args:
        message: as it stands in the row.
        mappings: key of the turn -> key of the message.
        roles: role of the message -> role of the turn; a role that is not there stays.
        template_names: what the template reads; of the keys that are not mapped, only these are passed on.
    """
    turn: Turn = {key: message[source] for key, source in mappings.items() if message.get(source) is not None}
    if isinstance(turn.get("role"), str):
        turn["role"] = roles.get(turn["role"], turn["role"])
    mapped = set(mappings.values())
    for key in template_names:
        if key not in turn and key not in mapped and key not in LABEL_KEYS and message.get(key) is not None:
            turn[key] = message[key]
    turn = {key: value if isinstance(value, str) else remove_none_values(value) for key, value in turn.items()}
    if turn.get("tool_calls"):
        turn["tool_calls"] = [_decoded_call(call) for call in turn["tool_calls"]]
    return turn


def join_parts(parts: list[dict[str, Any]], default_train: bool) -> tuple[str, list[dict[str, Any]] | None] | None:
    """Text parts, joined, and which of their characters are learnt.

    Args:
        parts: `{type: text, text|content|value: ..., train|weight: ...}`.
        default_train: for parts without a flag where others have one.

    Returns:
        The text, and details as in `message_field_training_detail` (None when no part has a flag). None when a part is
        no text (an image, say).

    Raises:
        DatasetError: a flag is neither true nor false, nor a number.
    """
    texts: list[str] = []
    flags: list[bool | None] = []
    for part in parts:
        if isinstance(part, str):
            part = {"text": part}
        if not isinstance(part, Mapping):
            return None
        text = next((part[key] for key in _PART_TEXT_KEYS if isinstance(part.get(key), str)), None)
        if text is None or part.get("type", "text") != "text":
            return None
        texts.append(text)
        said = ((key, part[key]) for key in _PART_TRAIN_KEYS if part.get(key) is not None)
        flags.append(next((read_flag(value, f"`{key}` of a part") for key, value in said), None))
    if all(flag is None for flag in flags):
        return "".join(texts), None
    details, begin = [], 0
    for text, flag in zip(texts, flags, strict=True):
        if text:
            train = default_train if flag is None else flag
            details.append({"begin_offset": begin, "end_offset": begin + len(text) - 1, "train": train})
        begin += len(text)
    return "".join(texts), details


def read_flag(value: Any, what: str) -> bool:
    """Whether something is learnt: true or false, or a number.

    Raises:
        DatasetError: it is something else. The text "false" would be true.
    """
    if isinstance(value, (bool, int, float)):
        return bool(value)
    raise DatasetError(f"{what} is {describe_value(value)}, but it must be true or false, without quotes.")


def read_details(value: Any, what: str) -> list[dict[str, Any]]:
    """Which characters of a content are learnt: `{begin_offset, end_offset, train}`, the last character included.

    Raises:
        DatasetError: they are something else.
    """
    if not isinstance(value, list) or not all(isinstance(detail, Mapping) for detail in value):
        raise DatasetError(f"{what} is {_kind(value)}, but it must be a list of `{{begin_offset, end_offset, train}}`.")
    for detail in value:
        for key in ("begin_offset", "end_offset"):
            offset = detail.get(key)
            if type(offset) is not int or offset < 0:
                shown = offset if type(offset) is int else describe_value(offset)
                raise DatasetError(f"`{key}` in {what} is {shown}, but it must be a whole number of at least 0.")
    return [{**detail, "train": read_flag(detail.get("train"), f"`train` in {what}")} for detail in value]


def split_thinking(turn: Turn, thinking_key: str) -> None:
    """Move the reasoning that the content holds between tags to its own key, and the details of its characters with it."""
    content = turn.get("content")
    if not isinstance(content, str) or turn.get(thinking_key):
        return
    for opening, closing in _THINKING_TAGS:
        start, end = content.find(opening), content.find(closing)
        if start == -1 or end < start:
            continue
        thinking = _stripped(content, start + len(opening), end)
        rest = _stripped(content, end + len(closing), len(content), right=False)
        opening, closing = _SOLUTION_TAGS
        start, end = content.find(opening, *rest), content.find(closing, *rest)
        if -1 not in (start, end):
            rest = _stripped(content, start + len(opening), end)
        turn[thinking_key], turn["content"] = content[slice(*thinking)], content[slice(*rest)]
        details = turn.pop(TRAINING_DETAIL, None)
        if details:
            turn[THINKING_DETAIL] = _details_within(details, *thinking)
            turn[TRAINING_DETAIL] = _details_within(details, *rest)
        return


def _stripped(text: str, begin: int, end: int, right: bool = True) -> tuple[int, int]:
    """Where a part of a text stands without the blanks at its left, and at its right."""
    part = text[begin:end].lstrip()
    begin = max(begin, end) - len(part)
    return begin, begin + len(part.rstrip() if right else part)


def _details_within(details: Iterable[Mapping[str, Any]], begin: int, end: int) -> list[dict[str, Any]]:
    """Details of a part of a content, which begins at character `begin`; one that learns nothing where none reach into it."""
    clipped = [
        {
            **detail,
            "begin_offset": max(detail["begin_offset"], begin) - begin,
            "end_offset": min(detail["end_offset"], end - 1) - begin,
        }
        for detail in details
    ]
    reaching = [detail for detail in clipped if detail["begin_offset"] <= detail["end_offset"]]
    return reaching or [{"begin_offset": 0, "end_offset": end - begin - 1, "train": False}]


def for_template(turns: Iterable[Turn]) -> list[Turn]:
    """The turns without the keys that are for the labels only. Most have none of them and stay what they are."""
    return [
        turn if LABEL_KEYS.isdisjoint(turn) else {key: value for key, value in turn.items() if key not in LABEL_KEYS}
        for turn in turns
    ]


def _decoded_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    holder = call["function"] if isinstance(call.get("function"), dict) else call
    if not isinstance(holder.get("arguments"), str):
        return call
    arguments = _from_json(
        holder["arguments"],
        f"`tool_calls`: Error parsing tool_calls arguments as JSON. Function: {holder.get('name')}, arguments",
    )
    decoded = {**holder, "arguments": arguments}
    return decoded if holder is call else {**call, "function": decoded}


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        raise DatasetError(f"{what} is text, but not JSON: {shown!r} ({error}).") from error


def _kind(value: Any) -> str:
    if isinstance(value, list):
        odd = next((item for item in value if not isinstance(item, Mapping)), None)
        return f"a list that holds {describe_value(odd)}"
    return describe_value(value)


def describe_value(value: Any) -> str:
    """What a value is, in a word."""
    return _WORDS.get(type(value), type(value).__name__)
