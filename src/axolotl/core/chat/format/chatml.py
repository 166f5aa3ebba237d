"""ChatML transformation functions for MessageContents

    <|im_start|>{role}\\n{content}<|im_end|>\\n

The role and the last line break are not trained; `<|im_end|>` is, when the last part of the message is.
"""

from __future__ import annotations

from axolotl.core.chat.format.shared import text_part, wrap_tools
from axolotl.core.chat.messages import Messages


def format_message(message: Messages, message_index: int | None = None) -> Messages:
    """The message with the text of ChatML.

    Args:
        message: is given back as it is when it is formatted already.
        message_index: not needed; other formats begin the first message in another way.
    """
    del message_index
    if message.is_chat_formatted:
        return message
    message = wrap_tools(message)
    last_weight = message.content[-1].weight if message.content else None
    content = [
        text_part(f"<|im_start|>{message.role}\n", weight=0),
        *message.content,
        text_part("<|im_end|>", weight=last_weight, eoc=True),
        text_part("\n", weight=0),
    ]
    return message.model_copy(update={"content": content, "is_chat_formatted": True})
