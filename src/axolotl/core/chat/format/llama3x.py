"""Llama 3.x chat formatting functions for MessageContents

    <|begin_of_text|><|start_header_id|>{role}<|end_header_id|>\\n\\n{content}<|eot_id|>

Tools answer as `ipython`. A message of the assistant that ends with a tool call ends with `<|eom_id|>`: its turn goes on when
the tool has answered. The header is not trained; the end is, when the last part of the message is.
"""

from __future__ import annotations

from axolotl.core.chat.format.shared import text_part
from axolotl.core.chat.messages import MessageContents, MessageContentTypes, MessageRoles, Messages


def format_message(message: Messages, message_index: int | None = None) -> Messages:
    """The message with the text of Llama 3.x.

    Args:
        message: is given back as it is when it is formatted already.
        message_index: 0 begins the conversation.
    """
    if message.is_chat_formatted:
        return message
    role = MessageRoles.ipython if message.role == MessageRoles.tool else message.role
    start = "<|begin_of_text|>" if message_index == 0 else ""
    last = message.content[-1] if message.content else None
    content = [
        text_part(f"{start}<|start_header_id|>{role}<|end_header_id|>\n\n", weight=0),
        *_stripped(message.content),
        text_part(_end(last), weight=None if last is None else last.weight, eoc=True),
    ]
    return message.model_copy(update={"role": role, "content": content, "is_chat_formatted": True})


def _end(last: MessageContents | None) -> str:
    calls_tool = last is not None and last.type == MessageContentTypes.tool_call
    return "<|eom_id|>" if calls_tool else "<|eot_id|>"


def _stripped(content: list[MessageContents]) -> list[MessageContents]:
    """The content without white space at its ends, as the format of the model asks for."""
    parts = list(content)
    for index, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if parts and parts[index].type == MessageContentTypes.text:
            update = {"value": strip(str(parts[index].value))}
            if index == -1:
                update["has_newline"] = False
            parts[index] = parts[index].model_copy(update=update)
    return parts
