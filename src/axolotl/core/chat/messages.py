"""Messages of a conversation, and how they become tokens and labels.

A conversation is a list of messages, a message a list of parts. A part is trained when its weight, or else that of its
message, or else that of its role (assistant: 1, others: 0) is above zero. The text of a conversation is tokenized as a
whole, so its tokens are those that a model sees at inference; a token is trained when the part that it begins in is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field, model_validator

from axolotl.exceptions import DatasetError, TokenizerError

IGNORE_INDEX = -100

Tokenize = Callable[..., Any]
Tokenized = dict[str, list[int]]


class MessageRoles(StrEnum):
    """Message roles for the system, user, assistant, and tools"""

    system = "system"
    user = "user"
    assistant = "assistant"
    tool = "tool"
    ipython = "ipython"  # the name that Llama 3 gives to tool


class MessageContentTypes(StrEnum):
    """Message content types for text, image, audio, tool calls, and tool responses"""

    special_token = "special_token"
    text = "text"
    image = "image"
    audio = "audio"
    tool_call = "tool_call"
    tool_response = "tool_response"


class SpecialToken(StrEnum):
    """Special tokens for beginning of string and end of string"""

    bos_token = "bos_token"
    eos_token = "eos_token"


class ToolCallFunction(BaseModel):
    """Tool call function with name and arguments"""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class Tool(BaseModel):
    """Tool with description, function, and parameters"""

    description: str | None = None
    function: ToolCallFunction
    parameters: dict[str, Any] = Field(default_factory=dict)


class ToolCallContents(BaseModel):
    """Tool call contents with name, arguments, and optional id"""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    id: str | None = None

    def __str__(self) -> str:
        """As JSON, the id only when there is one."""
        return json.dumps(self.model_dump(exclude_none=True), ensure_ascii=False)


class ToolResponseContents(BaseModel):
    """Tool response contents with name, content, and optional id"""

    name: str
    content: str | dict[str, Any] | list[Any]
    id: str | None = None

    def __str__(self) -> str:
        """As JSON, the id only when there is one."""
        return json.dumps(self.model_dump(exclude_none=True), ensure_ascii=False)


class MessageContents(BaseModel):
    """Message contents with type, value, metadata, weight, newline, and end of contents

    Attributes:
        type: what the part is.
        value: text, a `SpecialToken`, a tool call or a tool response; a path or URL for image and audio.
        meta: whatever else belongs to the part; it is not written.
        weight: above 0 is trained, 0 is not; None leaves it to the message.
        has_newline: a line break follows.
        eoc: the part ends the content of its message.
    """

    type: str | MessageContentTypes
    value: str | ToolCallContents | ToolResponseContents | SpecialToken
    meta: dict[str, Any] | None = None
    weight: float | None = None
    has_newline: bool = False
    eoc: bool = False

    @model_validator(mode="before")
    @classmethod
    def read_value(cls, data: Any) -> Any:
        """The value as its type asks for: calls and responses of tools look alike otherwise."""
        models = {"tool_call": ToolCallContents, "tool_response": ToolResponseContents}
        if isinstance(data, dict) and isinstance(data.get("value"), dict) and str(data.get("type")) in models:
            return {**data, "value": models[str(data["type"])](**data["value"])}
        if isinstance(data, dict) and str(data.get("type")) == "special_token":
            return {**data, "value": SpecialToken(data["value"])}
        return data

    def write(self, special_tokens: dict[str, str | None] | None = None) -> str:
        """The text of the part. Special tokens are written as `special_tokens` says, or nothing."""
        if isinstance(self.value, SpecialToken):
            text = (special_tokens or {}).get(self.value.value) or ""
        elif self.type in (MessageContentTypes.image, MessageContentTypes.audio):
            raise DatasetError(f"a message has a part of type `{self.type}`, but only text and tools can be written.")
        else:
            text = str(self.value)
        return text + "\n" if self.has_newline else text

    def __str__(self) -> str:
        return self.write()


class Messages(BaseModel):
    """Messages with role, content, metadata, weight, and chat formatting

    Attributes:
        role: who speaks.
        content: the parts; a text is one part.
        meta: whatever else belongs to the message; it is not written.
        weight: for the parts that have none of their own.
        is_chat_formatted: the text that the format puts around the content is in the parts.
    """

    role: MessageRoles | str
    content: list[MessageContents]
    meta: dict[str, Any] | None = None
    weight: float | None = None
    is_chat_formatted: bool = False

    @model_validator(mode="before")
    @classmethod
    def read_content(cls, data: Any) -> Any:
        """A text as a part."""
        if isinstance(data, dict) and isinstance(data.get("content"), str):
            return {**data, "content": [{"type": "text", "value": data["content"]}]}
        return data

    def __str__(self) -> str:
        return "".join(str(part) for part in self.content)

    def spans(self, special_tokens: dict[str, str | None], train_on_inputs: bool = False) -> list[tuple[str, bool]]:
        """Text of every part, and whether it is trained."""
        return [(part.write(special_tokens), self._is_trained(part, train_on_inputs)) for part in self.content]

    def _is_trained(self, part: MessageContents, train_on_inputs: bool) -> bool:
        if part.weight is not None:
            return part.weight > 0
        if self.weight is not None:
            return self.weight > 0
        return train_on_inputs or self.role == MessageRoles.assistant

    def tokenized(self, tokenizer: Tokenize, ignore_index: int = IGNORE_INDEX) -> Tokenized:
        """`input_ids`, `labels` and `attention_mask` of this message alone."""
        return tokenize_spans(self.spans(special_tokens_of(tokenizer)), tokenizer, ignore_index)


class Chats(BaseModel):
    """top level data structure for chat conversations"""

    conversation: list[Messages]

    def __str__(self) -> str:
        return "".join(str(message) for message in self.conversation)

    def spans(self, tokenizer: Tokenize) -> list[tuple[str, bool]]:
        """Text of every part of the conversation, and whether it is trained."""
        special_tokens = special_tokens_of(tokenizer)
        return [span for message in self.conversation for span in message.spans(special_tokens)]

    def tokenized(self, tokenizer: Tokenize, ignore_index: int = IGNORE_INDEX) -> Tokenized:
        """`input_ids`, `labels` and `attention_mask` of the conversation.

        Args:
            tokenizer: a fast tokenizer of transformers.
            ignore_index: label of what is not trained.
        """
        return tokenize_spans(self.spans(tokenizer), tokenizer, ignore_index)


class ChatFormattedChats(Chats):
    """Chat formatted chats with formatter and optional train on inputs

    Attributes:
        formatter: `formatter(message, message_index)` gives the message with the text of its format.
        train_on_inputs: train messages of every role that have no weight.
    """

    formatter: Callable[..., Messages]
    train_on_inputs: bool = False

    def model_post_init(self, context: Any) -> None:
        for index, message in enumerate(self.conversation):
            if not message.is_chat_formatted:
                self.conversation[index] = self.formatter(message, message_index=index)

    def spans(self, tokenizer: Tokenize) -> list[tuple[str, bool]]:
        special_tokens = special_tokens_of(tokenizer)
        return [span for message in self.conversation for span in message.spans(special_tokens, self.train_on_inputs)]


class PreferenceChats(BaseModel):
    """representation for preference data for chat"""

    prompt: list[Messages]
    chosen: Messages
    rejected: Messages


def special_tokens_of(tokenizer: Tokenize) -> dict[str, str | None]:
    """How a tokenizer writes the tokens of `SpecialToken`."""
    return {token.value: getattr(tokenizer, token.value, None) for token in SpecialToken}


def tokenize_spans(spans: list[tuple[str, bool]], tokenizer: Tokenize, ignore_index: int = IGNORE_INDEX) -> Tokenized:
    """Tokens of texts one after the other; only those that begin in a trained text have a label.

    Raises:
        TokenizerError: the tokenizer does not say where a token stands in the text.
    """
    text = "".join(part for part, _ in spans)
    if not text:
        return {"input_ids": [], "labels": [], "attention_mask": []}
    if not getattr(tokenizer, "is_fast", True):
        raise TokenizerError("messages need a fast tokenizer, which says where its tokens stand in the text.")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = [is_trained for part, is_trained in spans for _ in part]
    ids = list(encoded["input_ids"])
    labels = [
        token if start < len(trained) and trained[start] else ignore_index
        for token, (start, _) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
