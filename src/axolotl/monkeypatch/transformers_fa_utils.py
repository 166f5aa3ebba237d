"""Casting for flash attention (https://github.com/huggingface/transformers/pull/35834). Old name for the rest: see axolotl._moved."""

from __future__ import annotations

import torch

from axolotl._moved import old_name

__getattr__ = old_name(__name__)


def fixed_fa_peft_integration_check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    target_dtype: torch.dtype | None = None,
    preferred_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cast fp32 attention inputs back to half precision.

    PEFT usually casts layer norms to fp32 for stability, so that hidden states silently become fp32 too, which flash
    attention does not take. Inputs that are not fp32 come back as they are.

    Args:
        target_dtype: what to cast to.
        preferred_dtype: what to cast to when `target_dtype` is not given.
    """
    dtype = target_dtype or preferred_dtype
    if dtype is None or query.dtype != torch.float32:
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)
