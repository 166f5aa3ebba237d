"""Datasets of conversations: rows as `core.chat` messages, written in a format and tokenized."""

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {"TokenizedChatDataset": "axolotl.core.datasets.chat"})
