"""The `ebft` section, for `rl: ebft`: match the features of generated answers with those of real ones."""

from __future__ import annotations

from typing import Annotated, Literal

from axolotl.utils.schemas.fields import IGNORE_CASE, Float, Int, Words, key


class EBFTConfig(Words):
    """Energy-based fine-tuning."""

    feature_layers: list[Float] = key(
        "Depths of the layers that give features, as shares of the model.", [0.25, 0.5, 0.75]
    )
    embed_method: Annotated[Literal["last_token", "mean_pooling", "completion_mean", "concat"], IGNORE_CASE] = key(
        "How the features of a sequence become one vector.", "last_token"
    )
    use_whitening: bool = key("Whiten the features.", False)
    alignment_coef: Float = key("Weight of the likeness to the real answer.", 1.0)
    diversity_coef: Float = key("Weight of the difference between answers.", 1.0)
    ce_coef: Float = key("Weight of the cross-entropy of the real answer.", 0.0)
    adaptive_max_tokens: bool = key("Let the real answer's length limit the generated ones.", True)
    gt_length_multiplier: Float = key("That limit, as a multiple of the real answer's length.", 1.5, ge=0.1)
    mode: Annotated[Literal["structured", "strided"], IGNORE_CASE] = key(
        "Generate from prompts (`structured`) or from places within plain text (`strided`).", "structured"
    )
    stride: Int = key("Tokens between the places.", 8, ge=1)
    context_length: Int = key("Tokens before each place.", 8, ge=1)
    generate_max_len: Int = key("Tokens generated at each place.", 8, ge=1)
    n_samples_per_prompt: Int = key("Answers generated per prompt.", 4, ge=1)
    temperature: Float = key("Sampling temperature.", 0.6, ge=0)
    top_p: Float = key("Sample from the most probable tokens that sum to this.", 1.0, gt=0, le=1)
    rl_coef: Float = key("Weight of the reward.", 1.0)
    advantage_estimator: Annotated[Literal["rloo", "group_norm", "reinforce"], IGNORE_CASE] = key(
        "How rewards become advantages.", "rloo"
    )
    min_completion_prefix: Int = key("Answer tokens before the first place.", 0, ge=0)
