"""Scalable softmax (SSMax): attention that stays sharp however many keys it is spread over.

Nakanishi, "Scalable-Softmax Is Superior for Attention", https://arxiv.org/abs/2501.19399: the scores of a query that sees n keys
are multiplied by `s * log(n) + b` before the softmax. As this is one number per query, the query itself is multiplied, which
any attention function then takes. n is counted within the document, from `position_ids`, and stops at the sliding window of
a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from axolotl.exceptions import ConfigError, ModelError
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

DEFAULT_FACTOR, DEFAULT_BIAS = 0.43, 0.0
# Fields of a model's config, which say so wherever the model is loaded later.
FACTOR_FIELD, BIAS_FIELD = "scaling_softmax_factor", "scaling_softmax_bias"


def apply_scaling_softmax(model: PreTrainedModel, factor: float | None, bias: float | None) -> None:
    """Let the attention of `model` scale its scores. Other models that share its attention function do not. Safe to apply twice.

    Args:
        model: a model whose attention goes through transformers' interface.
        factor: s; None for 0.43.
        bias: b; None for 0.

    Raises:
        ConfigError: the attention of the model cannot be reached.
    """
    name = model.config._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS or not model._supports_attention_backend:
        raise ConfigError(
            f"`scaling_softmax: true` cannot be used with {type(model).__name__} and its attention `{name}`, which does not go through "
            "transformers' attention interface. Remove it."
        )
    config = model.config.get_text_config()
    setattr(config, FACTOR_FIELD, DEFAULT_FACTOR if factor is None else float(factor))
    setattr(config, BIAS_FIELD, DEFAULT_BIAS if bias is None else float(bias))
    function = ALL_ATTENTION_FUNCTIONS[name]
    if "axolotl_scales" not in vars(function):
        AttentionInterface.register(name, _scaled(function))
    LOG.warning(
        "`scaling_softmax: true`: the model answers as it was trained only where its scores are scaled too: here with the same config, "
        "but not by plain transformers or other programs."
    )


def _scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        config = vars(module).get("config")
        fields = {} if config is None else vars(config)
        if FACTOR_FIELD in fields:
            position_ids = kwargs.get("position_ids")
            if position_ids is None:
                raise ModelError(
                    f"`scaling_softmax: true`: {type(module).__name__} is not told the positions of its tokens. Remove it."
                )
            scale_BT = query_scale(position_ids, fields[FACTOR_FIELD], fields[BIAS_FIELD], kwargs.get("sliding_window"))
            query = query * scale_BT[:, None, :, None].to(query.dtype)
        return function(module, query, key, value, *args, **kwargs)

    vars(attend)["axolotl_scales"] = True
    return attend


def query_scale(position_ids: torch.Tensor, factor: float, bias: float, window: int | None) -> torch.Tensor:
    """`factor * log(n) + bias` for queries at these positions (B, T) of their documents, float32."""
    num_keys = position_ids + 1
    if window:
        num_keys = num_keys.clamp(max=window)
    return factor * num_keys.float().log() + bias
