"""Keys of the cut_cross_entropy plugin."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from axolotl.utils.schemas.fields import Words, key


class CutCrossEntropyArgs(Words):
    """Compute the loss without ever holding the logits."""

    cut_cross_entropy: bool | None = key("Compute the loss without ever holding the logits.", True)

    @model_validator(mode="before")
    @classmethod
    def needs_half_precision(cls, data: Any) -> Any:
        """The kernel computes in bfloat16 or float16."""
        if isinstance(data, dict) and data.get("cut_cross_entropy", True):
            half = [data.get("bf16", "auto"), data.get("bfloat16"), data.get("fp16"), data.get("float16")]
            if not any(half):
                raise ValueError("Cut Cross Entropy requires fp16/bf16 training for backward pass. Write `bf16: auto`.")
        return data

    @model_validator(mode="before")
    @classmethod
    def is_not_chunked_too(cls, data: Any) -> Any:
        """Two ways to compute one loss."""
        if isinstance(data, dict) and data.get("cut_cross_entropy", True) and data.get("chunked_cross_entropy"):
            raise ValueError(
                "`chunked_cross_entropy: true` cannot be used with the cut_cross_entropy plugin. Remove one."
            )
        return data
