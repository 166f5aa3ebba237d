"""Preferences and rewards."""

from __future__ import annotations

import math

from axolotl.exceptions import ConfigError
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.validation.common import (
    fill,
    is_reentrant,
    more_than_one,
    num_gpus,
    rl_method,
)

LOG = get_logger(__name__)

# Rows that strided EBFT may hold in memory at once before a warning.
EBFT_TOKENS = 20_000


def ipo_is_a_loss_of_dpo(cfg: DictDefault) -> None:
    """`rl: ipo` is `rl: dpo` with `dpo_loss_type: [ipo]`."""
    if rl_method(cfg) != "ipo":
        return
    LOG.warning("`rl: ipo` is deprecated. Write `rl: dpo` and `dpo_loss_type: [ipo]`.")
    fill(cfg, "rl", "dpo", "`rl: ipo`")
    if not cfg.dpo_loss_type:
        fill(cfg, "dpo_loss_type", ["ipo"], "`rl: ipo`")


def preference_rows_are_not_packed(cfg: DictDefault) -> None:
    """RL reads prompts and answers row by row."""
    method = rl_method(cfg)
    if method == "kto":
        if cfg.sample_packing or cfg.eval_sample_packing:
            raise ConfigError(
                "sample_packing is not supported with kto: its rows are compared one by one. Write `sample_packing: false`."
            )
        if cfg.remove_unused_columns is not False:
            raise ConfigError(
                "Set `remove_unused_columns: False` when using kto: its labels are a column that would be dropped."
            )
    elif method and cfg.sample_packing:
        raise ConfigError(
            f"`sample_packing: true` does not work with RLHF training (`rl: {method}`). Write `sample_packing: false`."
        )


def beta_is_given_once(cfg: DictDefault) -> None:
    """`rl_beta` and `trl.beta` are one number."""
    trl_beta = (cfg.trl or DictDefault()).beta
    if cfg.rl_beta is not None and trl_beta is not None and cfg.rl_beta != trl_beta:
        raise ConfigError(
            f"beta and trl.beta must match or one must be removed: `rl_beta: {cfg.rl_beta}`, `trl.beta: {trl_beta}`."
        )


def vllm_runs_as_a_server_unless_said(cfg: DictDefault) -> None:
    """`trl.use_vllm` without a mode asks a server."""
    if cfg.trl and cfg.trl.use_vllm and not cfg.trl.vllm_mode:
        LOG.warning(
            "`trl.vllm_mode` must be set to either `server` or `colocate` when using vllm, setting to `server`."
        )
        cfg.trl.vllm_mode = "server"
        note_choice(cfg, "trl.vllm_mode", "server", "`trl.use_vllm: true` names no mode")


def fused_grpo_loss_needs_whole_sequences(cfg: DictDefault) -> None:
    """Liger's GRPO loss does not know of split sequences."""
    if rl_method(cfg) == "grpo" and cfg.trl and cfg.trl.use_liger_loss and more_than_one(cfg.context_parallel_size):
        raise ConfigError(
            f"GRPO + SP + Liger not currently supported: `trl.use_liger_loss: true` with `context_parallel_size: {cfg.context_parallel_size}`. Remove one."
        )


def preference_qlora_on_several_gpus_needs_plain_checkpointing(cfg: DictDefault) -> None:
    """DDP marks a parameter ready twice when reentrant layers run twice in one step."""
    gpus = num_gpus(cfg)
    if (
        cfg.rl
        and cfg.adapter == "qlora"
        and cfg.load_in_4bit
        and cfg.gradient_checkpointing
        and is_reentrant(cfg) is True
        and gpus is not None
        and gpus > 1
    ):
        raise ConfigError(
            "The `use_reentrant: True` implementation of gradient checkpointing is not supported for distributed RL training with QLoRA. Write "
            "`gradient_checkpointing_kwargs: {use_reentrant: false}`."
        )


def gdpo_normalizes_each_reward(cfg: DictDefault) -> None:
    """GDPO is GRPO with rewards normalised before they are summed."""
    if rl_method(cfg) == "gdpo" and cfg.trl and cfg.trl.multi_objective_aggregation == "sum_then_normalize":
        raise ConfigError(
            "`rl: gdpo` cannot be combined with `trl.multi_objective_aggregation: sum_then_normalize`, which is `rl: grpo`. Remove it, or write `rl: grpo`."
        )


def dpo_losses_belong_to_dpo(cfg: DictDefault) -> None:
    """Weights come with as many losses, and only DPO reads them."""
    losses, weights = cfg.dpo_loss_type, cfg.dpo_loss_weights
    if weights is not None and losses is None:
        raise ConfigError(
            "`dpo_loss_weights` requires `dpo_loss_type` to be set. Write the losses that the weights are for."
        )
    for key in ("dpo_loss_type", "dpo_loss_weights"):
        if cfg[key] is not None and rl_method(cfg) != "dpo":
            raise ConfigError(f"`{key}` requires `rl: dpo`, but `rl: {rl_method(cfg)}`. Remove it.")
    if weights is not None and len(weights) != len(losses):
        raise ConfigError(
            f"`dpo_loss_type` and `dpo_loss_weights` must be of the same length: {len(losses)} losses and {len(weights)} weights."
        )


def the_fused_dpo_loss_is_one_loss(cfg: DictDefault) -> None:
    """Liger's DPO kernel has no IPO, and takes the first of several losses."""
    if not cfg.dpo_use_liger_kernel:
        return
    losses = cfg.dpo_loss_type or []
    if rl_method(cfg) == "ipo" or (losses and losses[0] == "ipo"):
        raise ConfigError("`dpo_use_liger_kernel: true` does not support the loss ipo. Remove it.")
    if len(losses) > 1:
        LOG.warning("`dpo_use_liger_kernel: true` with several losses: only the first (`%s`) is used.", losses[0])


def generations_of_a_prompt_fill_a_batch(cfg: DictDefault) -> None:
    """GRPO compares the answers to one prompt: the batch of each rank holds all of them."""
    generations = (cfg.trl or DictDefault()).num_generations
    if rl_method(cfg) != "grpo" or generations is None:
        return
    if generations < 2:
        raise ConfigError(
            f"`trl.num_generations: {generations}`: GRPO requires at least 2 generations per prompt, to compare them. Write `num_generations: 8`."
        )
    micro, steps = cfg.micro_batch_size or 1, cfg.gradient_accumulation_steps or 1
    size = cfg.trl.generation_batch_size or micro * steps
    if size % generations:
        smallest = generations // math.gcd(generations, micro)
        written = (
            f"`trl.generation_batch_size: {size}`"
            if cfg.trl.generation_batch_size
            else f"micro_batch_size x gradient_accumulation_steps = {size}"
        )
        raise ConfigError(
            f"{written} must be divisible by num_generations: `trl.num_generations: {generations}`. The smallest "
            f"`gradient_accumulation_steps` that fits is {smallest}."
        )


def simpo_warms_up_in_steps(cfg: DictDefault) -> None:
    """SimPO does not take a warmup ratio."""
    if rl_method(cfg) == "simpo" and cfg.warmup_ratio:
        raise ConfigError(
            f"warmup_ratio is not supported with the simpo trainer: `warmup_ratio: {cfg.warmup_ratio}`. Please use `warmup_steps` instead."
        )


def ebft_has_a_section(cfg: DictDefault) -> None:
    """Energy-based fine-tuning reads its options from `ebft`; its strided mode restricts how layers are checkpointed."""
    if rl_method(cfg) != "ebft":
        return
    if not isinstance(cfg.ebft, dict):
        raise ConfigError("`rl: ebft` requires an `ebft` section. Write `ebft: {mode: structured}`.")
    if cfg.ebft.mode != "strided":
        return
    checkpointing = bool(cfg.gradient_checkpointing)
    if cfg.torch_compile and checkpointing:
        raise ConfigError(
            "`ebft: {mode: strided}` with `torch_compile` and `gradient_checkpointing` is not supported. Remove one of both."
        )
    if cfg.torch_compile:
        LOG.warning("`ebft: {mode: strided}` with `torch_compile: true` compiles anew for every shape.")
    if cfg.attn_implementation == "flex_attention":
        if cfg.activation_offloading is True:
            raise ConfigError(
                "`ebft: {mode: strided}` with flex attention is not compatible with `activation_offloading: true`. Remove it."
            )
        if checkpointing and is_reentrant(cfg) is not True:
            kwargs = cfg.gradient_checkpointing_kwargs or DictDefault()
            kwargs.use_reentrant = True
            cfg["gradient_checkpointing_kwargs"] = kwargs
            note_choice(cfg, "gradient_checkpointing_kwargs.use_reentrant", True, "strided EBFT with flex attention")
    samples = cfg.ebft.n_samples_per_prompt or 4
    if (cfg.sequence_len or 512) * samples > EBFT_TOKENS:
        LOG.warning(
            "`ebft`: `sequence_len` x `n_samples_per_prompt` is %s tokens at once; this may not fit in memory.",
            (cfg.sequence_len or 512) * samples,
        )


CHECKS = (
    # The fused kernel must see `rl: ipo` as written.
    the_fused_dpo_loss_is_one_loss,
    ipo_is_a_loss_of_dpo,
    preference_rows_are_not_packed,
    beta_is_given_once,
    vllm_runs_as_a_server_unless_said,
    fused_grpo_loss_needs_whole_sequences,
    preference_qlora_on_several_gpus_needs_plain_checkpointing,
    gdpo_normalizes_each_reward,
    dpo_losses_belong_to_dpo,
    generations_of_a_prompt_fill_a_batch,
    simpo_warms_up_in_steps,
    ebft_has_a_section,
)
