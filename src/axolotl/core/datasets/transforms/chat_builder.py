"""From a row with a list of messages, under whatever names, to a row as `core.chat.messages.Chats` reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from axolotl.exceptions import DatasetError

ROLE_FIELDS = ("role", "from")
CONTENT_FIELDS = ("content", "value", "text")
TRAINING_FIELDS = ("train", "weight", "training")

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "ipython": "tool"}
"""Other names of roles."""

Row = Mapping[str, Any]


def chat_message_transform_builder(
    train_on_inputs: bool = False,
    conversations_field: str = "messages",
    message_field_role: str | list[str] | None = None,
    message_field_content: str | list[str] | None = None,
    message_field_training: str | list[str] | None = None,
) -> Callable[[Row], dict[str, list[dict[str, Any]]]]:
    """Builds a transform that takes a row from the dataset and converts it to a Chat

    Args:
        train_on_inputs (bool): If True, the transform will train on the inputs. If False, the transform will train on the
            targets. A message that says itself whether it is trained is taken at its word.
        conversations_field (str): The field name of the conversations.
        message_field_role (str | list[str]): The field name of the role; the first that a message has.
        message_field_content (str | list[str]): The field name of the message content; the first that a message has.
        message_field_training (str | list[str]): The field name of the training flag or weight.

    Returns:
        Callable: A function that takes a list of conversations and returns a list of messages.
    """
    role_fields = _names(message_field_role, ROLE_FIELDS)
    content_fields = _names(message_field_content, CONTENT_FIELDS)
    training_fields = _names(message_field_training, TRAINING_FIELDS)

    def to_message(message: Row, number: int) -> dict[str, Any]:
        role = _first(message, role_fields)
        if not isinstance(role, str):
            raise DatasetError(f"message {number} has no role: none of {_quoted(role_fields)} holds a text.")
        role = ROLES.get(role, role)
        content = _parts(_first(message, content_fields), f"message {number}")
        content += [_tool_call(call, f"message {number}") for call in message.get("tool_calls") or ()]
        if not content:
            raise DatasetError(f"message {number} has no content: none of {_quoted(content_fields)} holds any.")
        training = _first(message, training_fields)
        if training is None:
            weight: float = 1 if train_on_inputs or role == "assistant" else 0
        else:
            weight = float(training)
        return {"role": role, "content": content, "weight": weight}

    def transform(row: Row) -> dict[str, list[dict[str, Any]]]:
        conversation = row[conversations_field]
        if isinstance(conversation, str):
            conversation = _loads(conversation, conversations_field)
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise DatasetError(f"`{conversations_field}` must be a list of messages.")
        return {"conversation": [to_message(message, number) for number, message in enumerate(conversation)]}

    return transform


def _names(given: str | Sequence[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    if not given:
        return default
    return (given,) if isinstance(given, str) else tuple(given)


def _first(message: Row, fields: Sequence[str]) -> Any:
    """The first of the fields that is there and not null."""
    return next((message[field] for field in fields if message.get(field) is not None), None)


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    """Content as parts: a text, or a list of parts, each with its type and its value under `value` or the type's name."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "value": content}] if content else []
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, (list, tuple)):
        raise DatasetError(
            f"the content of {where} is {type(content).__name__}, but it must be text or a list of parts."
        )
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "value": part})
            continue
        kind = part.get("type") or "text"
        value = _first(part, ("value", kind, "content"))
        if value is None:
            raise DatasetError(f"a part of {where} has no `value`.")
        weight = _first(part, ("weight", "train"))
        parts.append({"type": kind, "value": value, "weight": None if weight is None else float(weight)})
    return parts


def _tool_call(call: Row, where: str) -> dict[str, Any]:
    """A call in the form of the OpenAI API, whose arguments may be JSON text."""
    function = call.get("function") or call
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _loads(arguments, f"tool_calls[].function.arguments` of `{where}")
    value = {"name": function.get("name"), "arguments": arguments}
    return {"type": "tool_call", "value": {**value, "id": call["id"]} if call.get("id") else value}


def _loads(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DatasetError(f"`{field}` is text but no JSON: {error}") from error


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
