"""Keys of the diffusion plugin."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from axolotl.utils.schemas.fields import IGNORE_CASE, Float, Int, Words, key


class DiffusionConfig(Words):
    """Train a model to fill in masked tokens, in the manner of LLaDA."""

    noise_schedule: Annotated[Literal["linear", "cosine"], IGNORE_CASE] = key(
        "How the share of masked tokens is drawn.", "linear"
    )
    min_mask_ratio: Float = key("Smallest share of masked tokens.", 0.1, ge=0, le=1)
    max_mask_ratio: Float = key("Largest share of masked tokens.", 0.9, ge=0, le=1)
    num_diffusion_steps: Int = key("Steps of the diffusion.", 128, ge=1)
    eps: Float = key("Smallest probability of masking a token.", 1e-3, ge=0, le=1)
    importance_weighting: bool = key("Divide each token's loss by its probability of being masked.", True)
    mask_token_id: Int | None = key("Token id of the mask.", ge=0)
    mask_token_str: str | None = key("Token to add as the mask, if the tokenizer has none.", "<|diffusion_mask|>")
    generate_samples: bool = key("Generate samples during training.", True)
    generation_interval: Int = key("Optimizer steps between samples.", 100, ge=1)
    num_generation_samples: Int = key("Samples to generate.", 3, ge=1)
    generation_steps: Int = key("Diffusion steps per sample.", 128, ge=1)
    generation_temperature: Float = key("Sampling temperature.", 0.0, ge=0)
    generation_max_length: Int = key("Longest sample, in tokens.", 100, ge=1)

    @model_validator(mode="after")
    def smallest_mask_is_not_above_the_largest(self) -> Self:
        if self.min_mask_ratio > self.max_mask_ratio:
            raise ValueError(
                f"`min_mask_ratio: {self.min_mask_ratio}` must be ≤ `max_mask_ratio: {self.max_mask_ratio}`. Swap them."
            )
        return self


class DiffusionArgs(Words):
    """Diffusion language models."""

    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig, description="Options of diffusion training.")
