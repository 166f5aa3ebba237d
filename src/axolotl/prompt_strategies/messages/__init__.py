"""Dataset types over `core.chat` messages: `type: messages.chat`."""

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {"load": "axolotl.prompt_strategies.messages.chat"})
