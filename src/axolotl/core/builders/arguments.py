"""Training arguments from a config: one reader per subject, each a function from `cfg` to keyword arguments.

What the user left open is decided here and recorded with `note_choice`, so that `train` can print it.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from axolotl.exceptions import ConfigError
from axolotl.utils.callbacks.trackers import trackers_of
from axolotl.utils.data.streaming import is_streamed
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.environment import find_device_type
from axolotl.utils.logging import get_logger
from axolotl.utils.samplers.geometry import is_varlen
from axolotl.utils.schedulers import Schedule
from axolotl.utils.schemas.validation.common import is_multiple

LOG = get_logger(__name__)

# Keys that transformers has under the same name, passed on when the config sets them.
SAME_NAME = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_timeout",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "gradient_accumulation_steps",
    "greater_is_better",
    "hub_model_id",
    "hub_revision",
    "hub_strategy",
    "include_num_input_tokens_seen",
    "label_smoothing_factor",
    "learning_rate",
    "lr_scheduler_kwargs",
    "max_grad_norm",
    "metric_for_best_model",
    "neftune_noise_alpha",
    "optim_target_modules",
    "save_only_model",
    "torch_empty_cache_steps",
    "weight_decay",
)

# Keys of ours under the same name in AxolotlTrainingMixins.
OWN_SAME_NAME = (
    "adam_beta3",
    "adam_epsilon2",
    "cosine_constant_lr_ratio",
    "cosine_min_lr_ratio",
    "curriculum_sampling",
    "dion_momentum",
    "dion_rank_fraction",
    "dion_rank_multiple_of",
    "embedding_lr",
    "embedding_lr_scale",
    "eval_sample_packing",
    "image_resize_algorithm",
    "image_size",
    "include_tkps",
    "include_tokens_per_second",
    "jagged_restart_anneal_steps",
    "jagged_restart_steps",
    "jagged_restart_warmup_steps",
    "loraplus_lr_embedding",
    "loraplus_lr_ratio",
    "lr_div_factor",
    "orpo_alpha",
    "relora",
    "relora_prune_ratio",
    "sample_packing_bin_size",
    "sample_packing_group_size",
    "sample_packing_mp_start_method",
)

# Metrics of an evaluation of which transformers thinks that a higher value is better, because they are not called a loss.
LOWER_IS_BETTER = ("ppl", "perplexity", "ter")


def read_warmup_steps(cfg: DictDefault, total_num_steps: int | None) -> int | float:
    """Steps of the warmup; below 1 it is a share of a run whose length is not known yet.

    Args:
        cfg: the config.
        total_num_steps: optimizer steps of all epochs, at most `max_steps`: the warmup is a share of these. None for a stream.
    """
    if cfg.warmup_steps is not None:
        return cfg.warmup_steps
    if not total_num_steps:
        return cfg.warmup_ratio if cfg.warmup_ratio is not None else 0.03
    if cfg.warmup_ratio is not None:
        steps = int(cfg.warmup_ratio * total_num_steps)
        reason = f"`warmup_ratio: {cfg.warmup_ratio}` of {total_num_steps} steps"
        if cfg.max_steps and cfg.max_steps > total_num_steps:
            reason += f", which are those of the epochs: `max_steps: {cfg.max_steps}` goes beyond them"
    else:
        steps = min(int(0.03 * total_num_steps), 100)
        reason = f"3 % of {total_num_steps} steps, at most 100"
    if steps == 1:
        steps, reason = 2, reason + "; one step would not warm up"
    note_choice(cfg, "warmup_steps", steps, reason)
    return steps


def read_logging_steps(cfg: DictDefault, total_num_steps: int | None) -> int | float:
    """Steps between log lines."""
    if cfg.logging_steps is not None:
        return cfg.logging_steps
    if not total_num_steps:
        return 500
    steps = max(min(int(0.005 * total_num_steps), 10), 1)
    note_choice(cfg, "logging_steps", steps, "half a percent of the steps, at most 10")
    return steps


def read_save_args(cfg: DictDefault) -> dict[str, Any]:
    """When and how to save, and how many checkpoints to keep."""
    args: dict[str, Any] = {
        "save_total_limit": cfg.save_total_limit if cfg.save_total_limit is not None else 4,
        "async_save": cfg.async_save is not False,
    }
    if cfg.save_steps:
        return {**args, "save_strategy": "steps", "save_steps": cfg.save_steps}
    return {**args, "save_strategy": cfg.save_strategy or "epoch"}


def read_watch_args(cfg: DictDefault) -> dict[str, Any]:
    """What to do when a loss or gradient is not finite."""
    return {
        "non_finite_policy": cfg.non_finite_policy or "stop",
        "non_finite_patience": cfg.loss_watchdog_patience or 3,
    }


def read_eval_args(cfg: DictDefault, has_eval_set: bool) -> dict[str, Any]:
    """When to evaluate. Without an evaluation set: never."""
    args: dict[str, Any] = {"per_device_eval_batch_size": cfg.eval_batch_size or cfg.micro_batch_size}
    if not has_eval_set:
        return {**args, "eval_strategy": "no"}
    if cfg.eval_steps:
        args.update(eval_strategy="steps", eval_steps=cfg.eval_steps)
    else:
        args["eval_strategy"] = cfg.eval_strategy or "epoch"
    args["eval_on_start"] = args["eval_strategy"] != "no"
    if args["eval_strategy"] != "no":
        args["load_best_model_at_end"] = bool(cfg.load_best_model_at_end) or bool(
            cfg.early_stopping_patience
            and cfg.save_steps
            and cfg.eval_steps
            and is_multiple(cfg.save_steps, cfg.eval_steps)
        )
        if (cfg.early_stopping_patience or args["load_best_model_at_end"]) and not cfg.metric_for_best_model:
            args["metric_for_best_model"] = "loss"
    return args


def read_best_args(cfg: DictDefault) -> dict[str, Any]:
    """Which way the metric of the best model goes, where its name does not tell transformers."""
    metric = cfg.metric_for_best_model
    if metric is None or cfg.greater_is_better is not None or metric.removeprefix("eval_") not in LOWER_IS_BETTER:
        return {}
    note_choice(cfg, "greater_is_better", False, f"a lower `{metric}` is better")
    return {"greater_is_better": False}


def check_best_model(cfg: DictDefault) -> None:
    """The best model can be kept: there are evaluations, and saves fall together with them.

    Raises:
        ConfigError: they do not, or early stopping has nothing to go by.
    """
    evals = read_eval_args(cfg, has_eval_set=bool(cfg.val_set_size or cfg.test_datasets))
    saves = read_save_args(cfg)
    if evals["eval_strategy"] == "no":
        remedy = "Nothing is evaluated during this run. Write `val_set_size: 0.05` or `test_datasets:`, and `evals_per_epoch: 1`."
        if cfg.early_stopping_patience:
            raise ConfigError(f"`early_stopping_patience: {cfg.early_stopping_patience}` needs evaluations. {remedy}")
        if cfg.load_best_model_at_end:
            LOG.warning(f"`load_best_model_at_end: true` has no effect: the last model is kept. {remedy}")
        return
    if not evals["load_best_model_at_end"] or saves["save_strategy"] == "best":
        return
    said = "`load_best_model_at_end: true` goes back to a checkpoint, so that every save must fall on an evaluation"
    remedy = "Write the same number for `saves_per_epoch` and `evals_per_epoch`, or a `save_steps` that is a multiple of `eval_steps`."
    if saves["save_strategy"] != evals["eval_strategy"]:
        raise ConfigError(
            f"{said}, but this run evaluates by `eval_strategy: {evals['eval_strategy']}` and saves by `save_strategy: "
            f"{saves['save_strategy']}`. {remedy}"
        )
    if (
        cfg.eval_steps
        and cfg.save_steps
        and min(cfg.eval_steps, cfg.save_steps) >= 1
        and cfg.save_steps % cfg.eval_steps
    ):
        raise ConfigError(
            f"{said}: `save_steps: {cfg.save_steps}` is no multiple of `eval_steps: {cfg.eval_steps}`. {remedy}"
        )


def align_saves(cfg: DictDefault, args: dict[str, Any], num_steps: int | None) -> dict[str, Any]:
    """Where the best model is kept, shares of a run as `eval_steps` and `save_steps` become steps that fall together.

    transformers rounds each of them up by itself: the best model would have been evaluated, and not saved.

    Args:
        cfg: the config.
        args: the training arguments read so far.
        num_steps: optimizer steps of the run; None when unknown.
    """
    evals, saves = args.get("eval_steps"), args.get("save_steps")
    if not (args.get("load_best_model_at_end") and num_steps and evals and saves) or min(evals, saves) >= 1:
        return {}
    eval_steps, wanted = (int(n) if n >= 1 else math.ceil(n * num_steps) for n in (evals, saves))
    save_steps = max(1, round(wanted / eval_steps)) * eval_steps
    if save_steps != wanted:
        note_choice(cfg, "save_steps", save_steps, f"the best model is kept, and evaluated every {eval_steps} steps")
    return {"eval_steps": eval_steps, "save_steps": save_steps}


def read_precision_args(cfg: DictDefault) -> dict[str, Any]:
    """Number formats, and the device where the config or the machine says CPU."""
    on_cpu = find_device_type() == "cpu"
    args: dict[str, Any] = {"bf16": bool(cfg.bf16), "fp16": bool(cfg.fp16) and not cfg.bf16, "use_cpu": on_cpu}
    if cfg.bf16 == "full":
        args["bf16_full_eval"] = True
    if on_cpu and args["fp16"]:
        args["fp16"] = False
        note_choice(cfg, "fp16", False, "a CPU has no mixed precision in fp16")
    if cfg.tf32 is True and not on_cpu:
        args["tf32"] = True
    return args


def read_checkpointing_args(cfg: DictDefault) -> dict[str, Any]:
    """Recomputing activations in the backward pass."""
    known = {field.name for field in fields(TrainingArguments)}
    prefix = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    if not cfg.gradient_checkpointing:
        return {prefix: False}
    kwargs = cfg.gradient_checkpointing_kwargs
    if kwargs is None:
        kwargs = {"use_reentrant": False}
        note_choice(cfg, "gradient_checkpointing_kwargs", kwargs, "works with frozen inputs and with every wrapper")
    return {prefix: True, f"{prefix}_kwargs": dict(kwargs)}


def read_hub_args(cfg: DictDefault) -> dict[str, Any]:
    """Pushing to the hub, private unless the config says otherwise."""
    if not cfg.hub_model_id:
        return {}
    return {"push_to_hub": True, "hub_private_repo": True, "hub_always_push": True}


def read_tracker_args(cfg: DictDefault) -> dict[str, Any]:
    """Which trackers to report to, and the name of the run: that of the first one that has a name."""
    on = trackers_of(cfg)
    names = [cfg[key] for tracker in on for key in tracker.run_names if cfg[key]]
    args: dict[str, Any] = {
        "report_to": [tracker.report_to for tracker in on if tracker.report_to] or "none",
        "run_name": names[0] if names else None,
    }
    if cfg.use_trackio:
        # Left open, transformers makes a second space on the hub, also for runs that asked for none.
        args.update(trackio_space_id=cfg.trackio_space_id, trackio_static_space_id=False)
        if cfg.trackio_project_name:
            args["project"] = cfg.trackio_project_name
    return args


def read_data_args(cfg: DictDefault) -> dict[str, Any]:
    """Order and loading of the data."""
    args: dict[str, Any] = {
        "dataloader_pin_memory": bool(cfg.dataloader_pin_memory) and find_device_type() != "cpu",
        "sample_packing": bool(cfg.sample_packing),
        "sample_packing_sequentially": bool(cfg.sample_packing_sequentially),
        "sample_packing_drop_attention_mask": bool(cfg.flash_attention or cfg.flex_attention),
        # One long row where attention works by borders, else rows of `sequence_len` (see `packing_geometry`).
        "multipack_real_batches": bool(cfg.multipack_real_batches) or not is_varlen(cfg),
        "max_seq_length": cfg.sequence_len or 512,
        "eval_max_seq_length": cfg.eval_sequence_len,
        "pretraining": is_streamed(cfg),
        # A stream goes to its place in the data by itself.
        "ignore_data_skip": is_streamed(cfg),
        "dataset_num_proc": cfg.dataset_num_proc,
    }
    if cfg.dataloader_num_workers:
        args["dataloader_prefetch_factor"] = cfg.dataloader_prefetch_factor
    if cfg.group_by_length and not is_streamed(cfg):
        args["train_sampling_strategy"] = "group_by_length"
    if cfg.accelerator_config:
        args["accelerator_config"] = cfg.accelerator_config.to_dict()
    return args


def read_scheduler_args(cfg: DictDefault) -> dict[str, Any]:
    """The learning rate schedule. `one_cycle` and `rex` are ours; transformers is told `cosine`."""
    name = str(cfg.lr_scheduler or "cosine")
    args: dict[str, Any] = {"lr_quadratic_warmup": bool(cfg.lr_quadratic_warmup)}
    if name in ("one_cycle", "rex"):
        return {**args, "lr_scheduler_type": "cosine", "alternate_lr_scheduler_type": name}
    return {**args, "lr_scheduler_type": name}


def read_schedule(cfg: DictDefault) -> Schedule:
    """The keys of the config that describe the learning rate over the run."""
    kwargs = cfg.lr_scheduler_kwargs
    return Schedule(
        name=str(cfg.lr_scheduler or "cosine"),
        learning_rate=float(cfg.learning_rate),
        kwargs=kwargs.to_dict() if isinstance(kwargs, DictDefault) else kwargs or {},
        quadratic_warmup=bool(cfg.lr_quadratic_warmup),
        min_lr_ratio=cfg.cosine_min_lr_ratio,
        constant_lr_ratio=cfg.cosine_constant_lr_ratio,
        div_factor=cfg.lr_div_factor,
        restart_steps=cfg.jagged_restart_steps,
        restart_warmup_steps=cfg.jagged_restart_warmup_steps,
        restart_anneal_steps=cfg.jagged_restart_anneal_steps,
    )


def read_loss_args(cfg: DictDefault) -> dict[str, Any]:
    """How tokens are weighed, and in how many pieces rows go through head and loss."""
    args: dict[str, Any] = {"loss_token_scaling": bool(cfg.liger_use_token_scaling)}
    if cfg.use_eaft:
        args["loss_entropy_top_k"] = cfg.eaft_k or 20
        args["loss_entropy_alpha"] = 1.0 if cfg.eaft_alpha is None else cfg.eaft_alpha
    if cfg.chunked_cross_entropy:
        args["loss_num_chunks"] = cfg.chunked_cross_entropy_num_chunks or 8
    return args


def read_distributed_args(cfg: DictDefault) -> dict[str, Any]:
    """FSDP and DeepSpeed."""
    args: dict[str, Any] = {}
    if cfg.fsdp or cfg.fsdp_config:
        args["fsdp"] = cfg.fsdp if cfg.fsdp else True
        if cfg.fsdp_config:
            args["fsdp_config"] = {
                key if key.startswith("fsdp_") else f"fsdp_{key}": value
                for key, value in cfg.fsdp_config.to_dict().items()
            }
    if cfg.deepspeed:
        args["deepspeed"] = cfg.deepspeed.to_dict() if isinstance(cfg.deepspeed, DictDefault) else cfg.deepspeed
    return args
