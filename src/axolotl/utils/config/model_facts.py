"""What the model's own config says, and where model, tokenizer and processor are read from."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LOG = get_logger(__name__)

# Model types of each family; a name that contains the family's word counts too.
FAMILIES = {
    "llama": ("llama", "mllama_text_model"),
    "falcon": ("falcon",),
    "mistral": ("mistral",),
    "qwen": ("qwen",),
}


def resolve_model_facts(cfg: DictDefault) -> None:
    """Fill where things are read from, and what kind of model it is. Loads the model's config.

    Raises:
        ModelError: the model's config cannot be loaded.
    """
    if cfg.revision_of_model and os.path.isdir(str(cfg.base_model)):
        LOG.warning_once(
            f"`revision_of_model: {cfg.revision_of_model}` has no effect: `base_model: {cfg.base_model}` is a folder on this machine."
        )
    cfg.base_model_config = cfg.base_model_config or cfg.base_model
    cfg.tokenizer_config = cfg.tokenizer_config or cfg.base_model_config
    model_config = _load_config(cfg)
    cfg.model_config_type = model_config.model_type
    text_config = model_config.get_text_config()
    cfg.model_config_type_text = text_config.model_type
    cfg.model_vocab_size = text_config.to_dict().get("vocab_size")
    cfg.is_multimodal = bool(cfg.is_multimodal) or reads_more_than_text(model_config)
    if cfg.is_multimodal:
        cfg.processor_config = cfg.processor_config or cfg.base_model_config
    for family, model_types in FAMILIES.items():
        key = f"is_{family}_derived_model"
        names = (str(cfg.base_model).lower(), str(cfg.type_of_model or "").lower())
        cfg[key] = bool(cfg[key]) or model_config.model_type in model_types or any(family in name for name in names)


def _load_config(cfg: DictDefault) -> PretrainedConfig:
    """The model's config, or only what its file says of a plain model when nothing but rows is prepared."""
    from axolotl.loaders.models_package import import_models

    import_models()
    from axolotl.loaders.plain_config import only_prepares, read_plain_config
    from axolotl.loaders.utils import check_model_config, load_model_config, read_revision

    source = str(cfg.base_model_config)
    plain = None
    if only_prepares() and not cfg.cls_model_config and not cfg.overrides_of_model_config:
        plain = read_plain_config(source, read_revision(cfg, source))
    if plain is None:
        return load_model_config(cfg)
    check_model_config(cfg, plain)
    return plain


def reads_more_than_text(model_config: PretrainedConfig) -> bool:
    """Whether the model takes images, audio or video beside text."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )

    takes_more = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES}
    return model_config.model_type in takes_more
