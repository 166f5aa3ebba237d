"""How many optimizer steps a run takes: exact before it starts."""

from __future__ import annotations

import math
import os
from typing import Any

from datasets import Dataset
from torch.utils.data import BatchSampler

from axolotl.exceptions import ConfigError
from axolotl.utils.data.rows import count_trained_tokens
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.samplers.epoch import EpochSampler, EvenBatches
from axolotl.utils.samplers.geometry import packing_geometry
from axolotl.utils.samplers.multipack import MultipackBatchSampler
from axolotl.utils.samplers.utils import get_dataset_lengths

LOG = get_logger(__name__)


def data_parallel_size(cfg: DictDefault) -> int:
    """Ranks that see different data: all of them, over those that share a batch."""
    world = int(cfg.world_size or os.environ.get("WORLD_SIZE") or 1)
    return max(1, world // int(cfg.tensor_parallel_size or 1) // int(cfg.context_parallel_size or 1))


def build_multipack_sampler(dataset: Dataset, cfg: DictDefault, *, is_eval: bool = False) -> MultipackBatchSampler:
    """The packed batches of a dataset, as a config asks for them.

    Args:
        dataset: prepared rows.
        cfg: the packing keys, `seed` and the shuffle keys are read.
        is_eval: the evaluation set: its own sizes, and the order of the dataset.
    """
    geometry = packing_geometry(cfg, is_eval)
    shuffle = not (is_eval or cfg.curriculum_sampling)
    return MultipackBatchSampler(
        EpochSampler(len(dataset), seed=int(cfg.seed or 0), shuffle=shuffle),
        batch_size=geometry.num_rows,
        batch_max_len=geometry.capacity,
        lengths=get_dataset_lengths(dataset),
        drop_last=bool(cfg.dataloader_drop_last) and not is_eval,
        sequential=bool(cfg.sample_packing_sequentially),
        group_size=int(cfg.sample_packing_group_size or 100_000),
        bin_size=int(cfg.sample_packing_bin_size or 200),
        one_row=geometry.one_row,
    )


def num_batches_per_rank(cfg: DictDefault, dataset: Dataset, packed: MultipackBatchSampler | None = None) -> int:
    """Micro-batches of one epoch on each data-parallel rank. `packed`: see `calculate_total_num_steps`."""
    drop_last = bool(cfg.dataloader_drop_last)
    if cfg.sample_packing:
        batches = build_multipack_sampler(dataset, cfg) if packed is None else packed
    else:
        batches = BatchSampler(range(len(dataset)), int(cfg.micro_batch_size or 1), drop_last)
    ranks = data_parallel_size(cfg)
    return len(EvenBatches(batches, ranks, drop_last=drop_last)) // ranks


def calculate_total_num_steps(
    cfg: DictDefault, train_dataset: Dataset, update: bool = True, packed: MultipackBatchSampler | None = None
) -> int:
    """Optimizer steps of all epochs, counted as transformers' `Trainer` counts them, and at most `max_steps`.

    Steps of an epoch are the micro-batches of one rank over `gradient_accumulation_steps`, rounded up: the last step may
    have fewer. A `max_steps` above them makes the run longer (`num_steps_of_run`), but not what is counted in shares of the data:
    the warmup, and the steps between log lines.

    Args:
        cfg: the config.
        train_dataset: prepared rows.
        update: also write `total_num_tokens`, `total_supervised_tokens` and `sample_packing_eff_est` into `cfg`.
        packed: the packed batches of `train_dataset`, with `sample_packing: true`; made here when None.

    Raises:
        ConfigError: `dataloader_drop_last` leaves no batch.
    """
    if cfg.sample_packing and packed is None:
        packed = build_multipack_sampler(train_dataset, cfg)
    if update:
        _count_tokens(cfg, train_dataset, packed)
    num_batches = num_batches_per_rank(cfg, train_dataset, packed)
    if cfg.dataloader_drop_last and not num_batches:
        raise ConfigError(
            f"`dataloader_drop_last: true` drops all {len(train_dataset)} rows: with `micro_batch_size: {cfg.micro_batch_size}` they fill no "
            f"batch for {data_parallel_size(cfg)} ranks. Write `dataloader_drop_last: false`, or a smaller `micro_batch_size`."
        )
    steps_per_epoch = max(1, math.ceil(num_batches / int(cfg.gradient_accumulation_steps or 1)))
    total = math.ceil(float(cfg.num_epochs or 1) * steps_per_epoch)
    return min(total, int(cfg.max_steps)) if cfg.max_steps and cfg.max_steps > 0 else total


def num_steps_of_run(cfg: DictDefault, total_num_steps: int | None) -> int | None:
    """Optimizer steps of the run: `max_steps`, else those of all epochs."""
    return int(cfg.max_steps) if cfg.max_steps and cfg.max_steps > 0 else total_num_steps


def _count_tokens(cfg: DictDefault, dataset: Dataset, packed: MultipackBatchSampler | None) -> None:
    if not cfg.total_num_tokens:
        cfg["total_num_tokens"] = int(get_dataset_lengths(dataset).sum())
        LOG.debug(f"total_num_tokens: {cfg.total_num_tokens:_}")
    if not cfg.total_supervised_tokens and "labels" in dataset.column_names:
        cfg["total_supervised_tokens"] = int(count_trained_tokens(dataset).sum())
        LOG.debug(f"total_supervised_tokens: {cfg.total_supervised_tokens:_}")
    if packed is not None and not cfg.sample_packing_eff_est:
        cfg["sample_packing_eff_est"] = packed.efficiency()


def packing_summary(packed: MultipackBatchSampler) -> dict[str, Any]:
    """How well rows fill their bins, for the report."""
    return {
        "bins": packed.plan.num_bins,
        "capacity": packed.batch_max_len,
        "efficiency": packed.efficiency(),
        "rows_per_bin": len(packed.lengths) / max(packed.plan.num_bins, 1),
    }
