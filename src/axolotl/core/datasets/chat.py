"""Rows that are conversations, tokenized as messages in the format of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset
from pydantic import ValidationError

from axolotl.core.chat.messages import ChatFormattedChats, Chats, Messages, Tokenize, Tokenized
from axolotl.datasets import TokenizedPromptDataset
from axolotl.exceptions import DatasetError

Formatter = Callable[..., Messages]
Transform = Callable[[Mapping[str, Any]], Any]


class ChatRows:
    """Tokenizes rows that are conversations.

    Args:
        tokenizer: a fast tokenizer.
        message_transform: from a row to `{"conversation": [messages]}` or to `Chats`; None when rows have a `conversation`.
        formatter: writes a message in the format of the model; None for messages that are written already.
    """

    filter_rows = None
    supports_batched = False
    row_offset = 0

    def __init__(self, tokenizer: Tokenize, message_transform: Transform | None, formatter: Formatter | None):
        self.tokenizer = tokenizer
        self.message_transform = message_transform
        self.formatter = formatter

    def tokenize_prompt(self, prompt: Mapping[str, Any]) -> Tokenized:
        """`input_ids`, `labels` and `attention_mask` of a row.

        Raises:
            DatasetError: the row is no conversation; says which message and field.
        """
        chat = self.message_transform(prompt) if self.message_transform else dict(prompt)
        chat = chat.model_dump() if isinstance(chat, Chats) else chat
        try:
            if self.formatter is None:
                return Chats(**chat).tokenized(self.tokenizer)
            return ChatFormattedChats(**{**chat, "formatter": self.formatter}).tokenized(self.tokenizer)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DatasetError(f"the row is no conversation: `{where}`: {first['msg']}") from error


class TokenizedChatDataset(Dataset):
    """Tokenized chat dataset

    Args:
        data: rows.
        model_transform: the tokenizer.
        args: passed to `datasets.Dataset`.
        message_transform: from a row to a conversation; see `chat_message_transform_builder`.
        formatter: `format_message` of a format.
        process_count: number of processes to use for tokenizing.
        keep_in_memory: whether to keep the tokenized dataset in memory.
        kwargs: passed to `datasets.Dataset`.
    """

    def __init__(
        self,
        data: Dataset,
        model_transform: Tokenize,
        *args: Any,
        message_transform: Transform | None = None,
        formatter: Formatter | None = None,
        process_count: int | None = None,
        keep_in_memory: bool | None = False,
        **kwargs: Any,
    ):
        rows: Any = ChatRows(model_transform, message_transform, formatter)
        tokenized = TokenizedPromptDataset(rows, data, process_count, keep_in_memory)
        super().__init__(tokenized.data, *args, **kwargs)
