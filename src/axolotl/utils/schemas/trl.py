"""The `trl` section: reinforcement learning with generated answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from axolotl.utils.schemas.fields import IGNORE_CASE, Float, Int, Words, key


class TRLConfig(Words):
    """Reinforcement learning with generated answers (GRPO and its relatives)."""

    beta: Float | None = key("Weight of the KL penalty; same as `rl_beta`.", ge=0)
    max_completion_length: Int | None = key("Longest generated answer, in tokens.", ge=1)
    use_vllm: bool = key("Generate with vLLM.", False)
    vllm_mode: Annotated[Literal["server", "colocate"] | None, IGNORE_CASE] = key(
        "Where vLLM runs: on a server of its own, or inside the training processes."
    )
    vllm_server_host: str | None = key("Host of the vLLM server.", "0.0.0.0")
    vllm_server_port: Int | None = key("Port of the vLLM server.", 8000)
    vllm_server_timeout: Int | None = key("Seconds to wait for the vLLM server.")
    vllm_guided_decoding_regex: str | None = key("Regular expression that generated text must match.")
    vllm_enable_sleep_mode: bool | None = key("Free vLLM's GPU memory while it is idle.")
    vllm_importance_sampling_correction: bool | None = key(
        "Correct for the difference between vLLM and the trained model."
    )
    vllm_importance_sampling_mode: Annotated[
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None, IGNORE_CASE
    ] = key("How that difference is corrected.")
    vllm_importance_sampling_cap: Float | None = key("Upper limit of the correction.")
    vllm_importance_sampling_clip_min: Float | None = key("Lower limit of the corrected ratio.")
    vllm_importance_sampling_clip_max: Float | None = key("Upper limit of the corrected ratio.")
    vllm_sync_interval: Int | None = key("Optimizer steps between weight transfers to vLLM.", ge=1)
    vllm_lora_sync: bool = key("Send only LoRA weights to vLLM.", False)
    reward_funcs: list[str] | None = key("Reward functions, as importable paths.")
    reward_weights: list[Float] | None = key("Weight of each reward function.")
    reward_num_workers: Int = key("Processes that compute rewards.", 1, ge=1)
    multi_objective_aggregation: Annotated[Literal["sum_then_normalize", "normalize_then_sum"] | None, IGNORE_CASE] = (
        key("How several rewards become one advantage.")
    )
    num_generations: Int | None = key("Answers generated per prompt.", ge=1)
    generation_batch_size: Int | None = key("Answers generated at a time.", ge=1)
    generation_kwargs: dict[str, Any] | None = key("Further arguments for generation.")
    chat_template_kwargs: dict[str, Any] | None = key("Arguments for the chat template of prompts.")
    log_completions: bool | None = key("Log generated answers.", False)
    num_completions_to_print: Int | None = key("Generated answers to print.")
    log_multimodal: bool | None = key("Log images beside generated answers.")
    importance_sampling_level: Annotated[Literal["sequence", "token"] | None, IGNORE_CASE] = key(
        "Level of the importance ratio; `sequence` gives GSPO."
    )
    sync_ref_model: bool | None = key("Let the reference model follow the trained one.", False)
    ref_model_mixup_alpha: Float | None = key("Share of the reference model that is kept at a sync.", 0.9)
    ref_model_sync_steps: Int | None = key("Optimizer steps between syncs of the reference model.", 64, ge=1)
    scale_rewards: bool | str = key("Divide rewards by their standard deviation.", True)
    temperature: Float | None = key("Sampling temperature.", ge=0)
    top_p: Float | None = key("Sample from the most probable tokens that sum to this.")
    top_k: Int | None = key("Sample from this many most probable tokens.")
    min_p: Float | None = key("Sample tokens at least this probable, relative to the best.")
    repetition_penalty: Float | None = key("Penalty for repeated tokens.")
    num_iterations: Int | None = key("Optimizer passes per generated batch.", ge=1)
    epsilon: Float | None = key("Clip range of the policy ratio.")
    epsilon_high: Float | None = key("Upper clip range of the policy ratio.")
    use_liger_loss: bool | None = key("Use Liger's fused GRPO loss.")
    loss_type: str | None = key("Form of the loss: `grpo`, `bnpo`, `dr_grpo`, `dapo`, ...")
    mask_truncated_completions: bool = key("Leave cut-off answers out of the loss.", False)
    entropy_coef: Float | None = key("Weight of the entropy bonus.")
    use_adaptive_entropy: bool | None = key("Adapt the entropy bonus to reach `entropy_target`.")
    entropy_target: Float | None = key("Entropy to reach.")
    entropy_coef_delta: Float | None = key("Step by which the entropy bonus adapts.")
    entropy_coef_min: Float | None = key("Lower limit of the entropy bonus.")
    entropy_coef_max: Float | None = key("Upper limit of the entropy bonus.")
    rollout_func: str | None = key("Function that generates answers, as an importable path.")
    use_data_producer: bool = key("Generate answers in a producer apart from training.", False)
    async_prefetch: bool = key("Generate the next batch while this one is trained on.", False)
    prefetch_depth: Int | None = key("Batches generated ahead.", ge=1)
    streaming_partial_batch: bool | None = key("Start training before a generated batch is complete.")
    streaming_min_groups: Int | None = key("Prompt groups that make a partial batch.", ge=1)
    off_policy_mask_threshold: Float | None = key("Leave out answers whose policy ratio is beyond this.")
    use_bias_correction_kl: bool | None = key("Correct the KL estimate for importance sampling.")
    replay_buffer_size: Int = key("Answers kept to train on again; 0 turns it off.", 0, ge=0)
    replay_recompute_logps: bool = key("Recompute log probabilities of replayed answers.", True)
    reroll_start_fraction: Float = key("Share of the run after which failed prompts are tried again.", 1.0, ge=0, le=1)
    reroll_max_groups: Int = key("Failed prompts tried again per batch.", 1, ge=0)
    skip_zero_advantage_batches: bool = key("Skip batches in which every advantage is zero.", True)
