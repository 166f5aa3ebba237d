"""Shared constants of `axolotl.loaders`."""

from __future__ import annotations

# Auto classes where the config names none: of models that read text, and of those that read images too.
DEFAULT_AUTO_MODEL = "AutoModelForCausalLM"
MULTIMODAL_AUTO_MODEL = "AutoModelForImageTextToText"
