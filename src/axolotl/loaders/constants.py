"""Shared constants of `axolotl.loaders`."""

from __future__ import annotations

# Loaders of images and text, by `model_type`, for configs whose auto class is not `AutoModelForCausalLM`.
MULTIMODAL_AUTO_MODEL = "AutoModelForImageTextToText"
DEFAULT_AUTO_MODEL = "AutoModelForCausalLM"
