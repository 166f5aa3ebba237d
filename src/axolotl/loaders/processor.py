"""Processor loading for multimodal models."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from axolotl.loaders.utils import explain_load_error, find_class, read_revision
from axolotl.utils.dict import DictDefault


def load_processor(cfg: DictDefault, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """The processor of a multimodal model, around our tokenizer.

    Args:
        cfg: `processor_type` (a class of transformers, `AutoProcessor` by default), `processor_config` (by default
            `base_model`) and `processor_kwargs` are read.
        tokenizer: replaces the processor's own, so that added tokens and the chat template hold for both.

    Raises:
        ConfigError: `processor_type` is not a class of transformers.
        ModelError: the processor cannot be read.
    """
    source = cfg.processor_config or cfg.base_model
    processor_class = find_class("processor_type", cfg.processor_type, "AutoProcessor")
    keywords: dict[str, Any] = dict(cfg.processor_kwargs or {})
    keywords["trust_remote_code"] = bool(cfg.trust_remote_code)
    revision = read_revision(cfg, source)
    if revision:
        keywords["revision"] = revision
    try:
        processor = processor_class.from_pretrained(source, tokenizer=tokenizer, **keywords)
    except (OSError, ValueError, KeyError) as error:
        key = "processor_config" if source != cfg.base_model else "base_model"
        raise explain_load_error(str(source), key, error) from error
    if hasattr(processor, "tokenizer") and tokenizer.chat_template is not None:
        processor.chat_template = tokenizer.chat_template
    return processor
