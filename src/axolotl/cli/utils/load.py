"""Utilities for model, tokenizer, etc. loading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl.loaders import ModelLoader, load_processor, load_tokenizer
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

LOG = get_logger(__name__)


def load_model_and_tokenizer(
    *, cfg: DictDefault, inference: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin | None]:
    """Helper function for loading a model, tokenizer, and processor specified in the given `axolotl` config.

    Args:
        cfg: the config of a run, as `load_cfg` returns it.
        inference: load for generating instead of training.

    Returns:
        The model, the tokenizer, and the processor of a multimodal model, else None.
    """
    LOG.info("loading tokenizer: %s", cfg.tokenizer_config or cfg.base_model_config or cfg.base_model)
    tokenizer = load_tokenizer(cfg)
    LOG.info("loading model: %s", cfg.base_model)
    model, _ = ModelLoader(cfg, tokenizer, inference=inference).load()
    processor = None
    if cfg.is_multimodal:
        LOG.info("loading processor: %s", cfg.processor_config or cfg.base_model)
        processor = load_processor(cfg, tokenizer)
    return model, tokenizer, processor
