"""Keys of the llm_compressor plugin."""

from __future__ import annotations

from typing import Any

from axolotl.utils.schemas.fields import Words, key, required


class CompressionArgs(Words):
    """How a sparse model is kept sparse."""

    recipe: str | dict[str, Any] = required("Recipe of LLM Compressor: a mapping, or its text or path.")
    save_compressed: bool = key("Save the model in compressed form.", False)


class LLMCompressorArgs(Words):
    """Train models that LLM Compressor made sparse."""

    llmcompressor: CompressionArgs | None = key("How a sparse model is kept sparse.")
