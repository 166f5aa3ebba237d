"""Keys of the hatchery plugin."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from axolotl.utils.schemas.fields import IGNORE_CASE, Float, Int, Words, key


class HatcheryConfig(Words):
    """Train on a remote service."""

    backend: Annotated[Literal["tinker", "hatchery"], IGNORE_CASE] = key("Service to train on.", "tinker")
    base_url: str | None = key("Address of the service.")
    api_key: str | None = key("Secret key. Better set it in the environment.")
    project_id: str | None = key("Project of the run.")
    lora_rank: Int = key("Rank of the LoRA matrices.", 32, ge=1)
    train_attn: bool = key("Train attention.", True)
    train_mlp: bool = key("Train MLPs.", True)
    train_unembed: bool = key("Train the output embedding.", True)
    loss_fn: Annotated[Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"], IGNORE_CASE] = key(
        "Loss.", "cross_entropy"
    )
    loss_fn_config: dict[str, Any] | None = key("Arguments for the loss.")
    pipeline: bool = key("Send the next batch before this one is done.", True)
    max_sample_tokens: Int = key("Longest sample, in tokens.", 256, ge=1)
    sample_temperature: Float = key("Sampling temperature.", 1.0, ge=0)
    num_samples: Int = key("Samples per prompt.", 4, ge=1)
    reward_funcs: list[str] | None = key("Reward functions, as importable paths.")
    save_steps: Int | None = key("Optimizer steps between remote checkpoints.", ge=1)
    save_name_prefix: str | None = key("Start of the names of remote checkpoints.")
    future_timeout: Float = key("Seconds to wait for the service.", 600, gt=0)


class HatcheryArgs(Words):
    """Train on a remote service."""

    hatchery: HatcheryConfig | None = key("Options of remote training.")
