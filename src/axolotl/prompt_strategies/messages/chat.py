"""Chat dataset wrapping strategy for new internal messages representations

datasets:
  - path: chats.jsonl
    type: messages.chat
    chat_template: chatml            # or llama3
    input_transform: my_package.my_function   # optional: changes a row first; `chat` and nothing leave it as it is
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from axolotl.core.chat.format import chatml, llama3x
from axolotl.core.datasets.chat import ChatRows, Formatter, TokenizedChatDataset, Transform
from axolotl.core.datasets.transforms.chat_builder import chat_message_transform_builder
from axolotl.exceptions import ConfigError
from axolotl.prompt_tokenizers import DatasetWrappingStrategy

FORMATS: dict[str, Formatter] = {"chatml": chatml.format_message, "llama3": llama3x.format_message}
"""`chat_template` -> how messages are written."""

UNCHANGED = "chat"
"""The `input_transform` of rows that are conversations already."""


class ChatMessageDatasetWrappingStrategy(ChatRows, DatasetWrappingStrategy):
    """Chat dataset wrapping strategy for new internal messages representations

    Args:
        processor: the tokenizer.
        message_transform: from a row to a conversation.
        formatter: writes a message in the format of the model.
        kwargs: accepted for subclasses.
    """

    def __init__(
        self,
        processor: Any,
        message_transform: Transform | None = None,
        formatter: Formatter | None = None,
        **kwargs: Any,
    ):
        del kwargs
        super().__init__(processor, message_transform, formatter)
        self.processor = processor

    def wrap_dataset(
        self, dataset: Any, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
    ) -> TokenizedChatDataset:
        """The dataset, tokenized."""
        return TokenizedChatDataset(
            dataset,
            model_transform=self.processor,
            message_transform=self.message_transform,
            formatter=self.formatter,
            process_count=process_count,
            keep_in_memory=keep_in_memory,
            **kwargs,
        )


class _Then:
    """One transform after the other. A class and not a function, so that worker processes can be handed it."""

    def __init__(self, first: Transform, second: Transform):
        self.first = first
        self.second = second

    def __call__(self, row: Mapping[str, Any]) -> Any:
        return self.second(self.first(row))


def load(tokenizer: Any, cfg: Any, ds_cfg: Mapping[str, Any] | None = None) -> ChatMessageDatasetWrappingStrategy:
    ds_cfg = ds_cfg or {}
    mappings = ds_cfg.get("message_property_mappings") or {}
    transform: Transform = chat_message_transform_builder(
        train_on_inputs=bool(cfg.train_on_inputs),
        conversations_field=ds_cfg.get("field_messages") or "messages",
        message_field_role=mappings.get("role"),
        message_field_content=mappings.get("content"),
        message_field_training=ds_cfg.get("message_field_training"),
    )
    if ds_cfg.get("input_transform") not in (None, "", UNCHANGED):
        transform = _Then(_function(ds_cfg["input_transform"]), transform)
    name = str(ds_cfg.get("chat_template") or cfg.chat_template or "chatml")
    if name not in FORMATS:
        raise ConfigError(
            f"`type: messages.chat` writes messages as {' or '.join(FORMATS)}, not `chat_template: {name}`. Write one of them, or "
            "`type: chat_template`, which takes any template."
        )
    return ChatMessageDatasetWrappingStrategy(tokenizer, message_transform=transform, formatter=FORMATS[name])


def _function(path: str) -> Transform:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"`input_transform: {path}` names no function: {error}. Write `package.module.function`."
        ) from error
