"""Sizes of batches, and steps between saves and evaluations."""

from __future__ import annotations

from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


def resolve_batch_size(cfg: DictDefault) -> None:
    """`batch_size` is the number of rows of one optimizer step over all ranks.

    Ranks that share a sequence or a layer (context and tensor parallel) see the same rows and do not add to it.
    """
    micro = cfg.micro_batch_size or 1
    if cfg.gradient_accumulation_steps is None and not cfg.use_ray:
        cfg.gradient_accumulation_steps = max((cfg.batch_size or micro) // micro, 1)
        note_choice(
            cfg, "gradient_accumulation_steps", cfg.gradient_accumulation_steps, "batch_size / micro_batch_size"
        )
    cfg.micro_batch_size = micro
    data_ranks = 1
    if cfg.world_size > 1 and (cfg.ddp or cfg.fsdp or cfg.fsdp_config):
        data_ranks = max(cfg.world_size // (cfg.context_parallel_size or 1) // (cfg.tensor_parallel_size or 1), 1)
    cfg.batch_size = micro * (cfg.gradient_accumulation_steps or 1) * data_ranks
    note_choice(
        cfg,
        "batch_size",
        cfg.batch_size,
        f"micro_batch_size x gradient_accumulation_steps x {data_ranks} data-parallel ranks",
    )
    if cfg.eval_batch_size is None:
        cfg.eval_batch_size = micro


def resolve_save_steps(cfg: DictDefault) -> None:
    """`saves_per_epoch` becomes `save_steps`, as a share of the run."""
    if cfg.saves_per_epoch and cfg.save_steps is None:
        _resolve_steps(cfg, "save", cfg.saves_per_epoch)


def resolve_eval_steps(cfg: DictDefault) -> None:
    """`evals_per_epoch` becomes `eval_steps`, as a share of the run, when there is something to evaluate on."""
    if cfg.evals_per_epoch and cfg.eval_steps is None and (cfg.val_set_size or cfg.test_datasets):
        _resolve_steps(cfg, "eval", cfg.evals_per_epoch)


def _resolve_steps(cfg: DictDefault, kind: str, per_epoch: int) -> None:
    epochs = cfg.num_epochs or 1.0
    share = 1.0 / (per_epoch * epochs)
    written = f"`{kind}s_per_epoch: {per_epoch}` over {epochs:g} epochs"
    if share < 1.0:
        cfg[f"{kind}_steps"] = share
        note_choice(cfg, f"{kind}_steps", share, f"{written}; a share of the run")
    elif share == 1.0:
        # A value of 1.0 would be read as "every step".
        cfg[f"{kind}_strategy"] = "epoch"
        note_choice(cfg, f"{kind}_strategy", "epoch", written)
    else:
        LOG.warning("%s is less than once in the run: `%s_steps` is left open. Write `%s_steps`.", written, kind, kind)
