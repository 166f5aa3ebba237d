"""The config of a plain language model, without the class that transformers has for it.

Such a class imports activations, kernels and torch's compiler: longer than everything else that preparing a few rows takes.
What preparing asks of a config stands in `config.json`: which kind of model it is, for the facts and for the choice of the
tokenizer, and how many tokens its embedding has. Training builds the class, and finds prepared rows only under a tokenizer with the same vocabulary, rules and class.
"""

from __future__ import annotations

import os

from transformers import PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

PLAIN_MODEL_TYPES = frozenset(
    """llama qwen2 qwen2_moe qwen3 qwen3_moe phi phi3 gemma gemma2 gpt2 gpt_neox falcon mixtral olmo olmo2 granite starcoder2
    stablelm smollm3 cohere deepseek_v3 gpt_oss""".split()  # noqa: SIM905 - a list of quoted words would take a page
)
"""Kinds of model that read text only and have one config, not one inside another."""

NESTED = frozenset({"rope_scaling", "rope_parameters", "quantization_config"})
"""Fields of such a config that are mappings."""


def only_prepares() -> bool:
    """Whether this process prepares rows and ends (`axolotl preprocess`)."""
    return os.environ.get("AXOLOTL_IS_PREPROCESS") == "1"


def read_plain_config(source: str, revision: str | None = None) -> PretrainedConfig | None:
    """What `config.json` says of a plain language model, as `PretrainedConfig`: no default of the model's class is filled in.

    None for any other model and for what cannot be read: the class of the model will say what is wrong.

    Args:
        source: a folder or a name on the hub.
        revision: of the hub repository.
    """
    try:
        content, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    except (OSError, ValueError, KeyError):
        return None
    nested = {key for key, value in content.items() if isinstance(value, dict)}
    if content.get("model_type") not in PLAIN_MODEL_TYPES or not nested <= NESTED:
        return None
    kept = ("model_type", "architectures", "quantization_config", "vocab_size")
    return PretrainedConfig.from_dict({key: content[key] for key in kept if key in content}, name_or_path=source)


def read_config_for_tokenizer(source: str, revision: str | None = None) -> PretrainedConfig | None:
    """A plain config with which `AutoTokenizer` chooses as it does with the model's class: where it chooses by names alone.

    It does when `tokenizer_config.json` names a class of transformers and no code of its own. None otherwise.
    """
    said = get_tokenizer_config(source, revision=revision)
    if not isinstance(said.get("tokenizer_class"), str) or "auto_map" in said:
        return None
    return read_plain_config(source, revision)
