"""What formats share: the parts that they add, and the tags around tools."""

from __future__ import annotations

from axolotl.core.chat.messages import MessageContents, MessageContentTypes, Messages

TAGS = {
    MessageContentTypes.tool_call: ("<tool_call>", "</tool_call>"),
    MessageContentTypes.tool_response: ("<tool_response>", "</tool_response>"),
}


def text_part(
    value: str, *, weight: float | None = None, has_newline: bool = False, eoc: bool = False
) -> MessageContents:
    """A part that the format adds. With weight None it is trained as its message is."""
    return MessageContents(type=MessageContentTypes.text, value=value, weight=weight, has_newline=has_newline, eoc=eoc)


def wrap_tools(message: Messages) -> Messages:
    """The message with each tool call and tool response on a line of its own between tags, which share its weight."""
    content: list[MessageContents] = []
    for part in message.content:
        if part.type not in TAGS:
            content.append(part)
            continue
        opening, closing = TAGS[MessageContentTypes(part.type)]
        content += [
            text_part(opening, weight=part.weight, has_newline=True),
            part.model_copy(update={"has_newline": True}),
            text_part(closing, weight=part.weight, has_newline=True),
        ]
    return message.model_copy(update={"content": content})
