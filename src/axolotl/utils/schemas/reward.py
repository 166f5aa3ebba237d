"""Preferences and rewards."""

from __future__ import annotations

from pydantic import Field

from axolotl.utils.schemas.ebft import EBFTConfig
from axolotl.utils.schemas.fields import Float, Int, Words, key
from axolotl.utils.schemas.trl import TRLConfig
from axolotl.utils.schemas.vllm import VllmConfig


class RewardConfig(Words):
    """Preferences and rewards."""

    trl: TRLConfig | None = Field(default_factory=TRLConfig, description="Options of reinforcement learning.")
    vllm: VllmConfig | None = Field(default_factory=VllmConfig, description="How the vLLM server starts.")
    ebft: EBFTConfig | None = key("Options of `rl: ebft`.")
    reward_model: bool | None = key("Train a reward model.")
    process_reward_model: bool | None = key("Train a process reward model, which judges each step.")
    center_rewards_coefficient: Float | None = key("Pull the reward model's mean to zero; 0.01 is recommended.")
    num_labels: Int | None = key("Outputs of a classification model.", ge=1, le=1_000_000)
    rl_beta: Float | None = key("Beta of preference losses.", ge=0)
    rl_adapter_ref_model: bool | None = key(
        "Load a reference model beside an adapter instead of switching the adapter off for reference log probabilities."
    )
    dpo_use_weighting: bool | None = key("DPO: weight pairs by their probability (WPO).")
    dpo_label_smoothing: Float | None = key("DPO: share of labels taken to be wrong.", ge=0, le=0.5)
    dpo_padding_free: bool | None = key("DPO: put sequences in one row instead of padding.")
    dpo_use_liger_kernel: bool | None = key("DPO: use Liger's fused loss.")
    dpo_loss_type: list[str] | None = key("DPO: one or more losses.", min_length=1)
    dpo_loss_weights: list[Float] | None = key("DPO: weight of each loss.", min_length=1)
    precompute_ref_log_probs: bool | None = key("DPO: compute reference log probabilities before training.")
    orpo_alpha: Float | None = key("ORPO: weight of the odds-ratio loss.")
    simpo_gamma: Float | None = key("SimPO: target margin.")
    cpo_alpha: Float | None = key("CPO: weight of the cross-entropy term.")
    kto_desirable_weight: Float | None = key("KTO: weight of good answers.")
    kto_undesirable_weight: Float | None = key("KTO: weight of bad answers.")
    max_prompt_len: Int | None = key("Longest prompt in preference training, in tokens.", ge=1)
