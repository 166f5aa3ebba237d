"""Rows of several datasets as one: in which order, without duplicates, this process's shard of them, and how often each is used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, concatenate_datasets

from axolotl.exceptions import DatasetError
from axolotl.utils.data.dedup import drop_duplicates
from axolotl.utils.data.rows import take_rows
from axolotl.utils.data.shared import read_shard
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

WEIGHT = "dataset_weight"
"""Column of merged rows with the `weight` of their dataset, when any dataset has one."""


def merge_datasets(prepared: Sequence[Dataset], stays: Sequence[np.ndarray], cfg: DictDefault) -> tuple[Dataset, int]:
    """Put datasets together in the order that the shuffle keys ask for.

    Args:
        prepared: the rows that stay, of every dataset that has any.
        stays: for every dataset, of each row that was made whether it stays, bool.
        cfg: the config.

    Returns:
        `(rows, duplicates dropped)`.
    """
    merged = prepared[0] if len(prepared) == 1 else concatenate_datasets(alike(prepared))
    merged = take_rows(merged, order_rows(stays, cfg))
    num_duplicates = 0
    if cfg.dataset_exact_deduplication:
        merged, num_duplicates = drop_duplicates(merged)
        LOG.info(f"{num_duplicates:,} duplicate rows dropped (`dataset_exact_deduplication: true`)")
    num_shards, shard = read_shard(cfg)
    if num_shards > len(merged):
        raise DatasetError(
            f"`dataset_shard_num: {num_shards}` is more than the {len(merged):,} rows there are. Write a smaller number."
        )
    return merged if num_shards == 1 else merged.shard(num_shards=num_shards, index=shard), num_duplicates


def order_rows(stays: Sequence[np.ndarray], cfg: DictDefault) -> np.ndarray:
    """The numbers of the rows that stay, among those that stay, in the order that the shuffle keys ask for.

    All rows that were made are shuffled, so that dropping some, as another `sequence_len` does, leaves the others in their order.

    Args:
        stays: for every dataset, of each row that was made whether it stays, bool.
        cfg: the config.
    """
    seed, shuffle = int(cfg.seed or 0), not keeps_order(cfg)
    stay = np.concatenate(stays)
    order = np.arange(len(stay))
    # Of a single dataset that is shuffled anyway, one shuffle is enough.
    if cfg.shuffle_before_merging_datasets and (len(stays) > 1 or not shuffle):
        ends = np.cumsum([len(one) for one in stays])
        order = np.concatenate(
            [
                end - len(one) + np.random.default_rng(seed).permutation(len(one))
                for end, one in zip(ends, stays, strict=True)
            ]
        )
    if shuffle:
        order = order[np.random.default_rng(seed).permutation(len(order))]
    return (np.cumsum(stay) - 1)[order[stay[order]]]


def alike(prepared: Sequence[Dataset]) -> list[Dataset]:
    """The same columns of the same types, so that datasets can be put together."""
    common = set.intersection(*(set(dataset.column_names) for dataset in prepared))
    extra = set.union(*(set(dataset.column_names) for dataset in prepared)) - common
    if extra:
        LOG.warning(f"columns that not every dataset has are left out: {', '.join(sorted(extra))}")
    columns = [column for column in prepared[0].column_names if column in common]
    features = prepared[0].select_columns(columns).features
    alike = [dataset.select_columns(columns) for dataset in prepared]
    return [dataset if dataset.features == features else dataset.cast(features) for dataset in alike]


def apply_weights(dataset: Dataset, cfg: DictDefault) -> Dataset:
    """Use the rows of a dataset with `weight: 2.5` two or three times, of one with `weight: 0.5` every other row.

    This comes after the validation split, so that no copy of a held-out row is trained on. Which rows are used once more, or
    are left out, follows from `seed`.
    """
    if WEIGHT not in dataset.column_names:
        return dataset
    weights = np.asarray(dataset.with_format("numpy")[WEIGHT][:])
    dataset = dataset.remove_columns(WEIGHT)
    rng = np.random.default_rng(int(cfg.seed or 0))
    times = np.floor(weights).astype(np.int64)
    for weight in np.unique(weights):
        rows = np.flatnonzero(weights == weight)
        extra = round((weight - np.floor(weight)) * len(rows))
        times[rng.permutation(rows)[:extra]] += 1
    chosen = np.repeat(np.arange(len(dataset)), times)
    if not len(chosen):
        raise DatasetError(
            "no row is left to train on: `weight` of the datasets is too small for their number of rows."
        )
    LOG.info(f"`weight` makes {len(chosen):,} rows per epoch of {len(dataset):,}")
    return take_rows(dataset, chosen if keeps_order(cfg) else rng.permutation(chosen))


def without_weights(evaluation: Dataset | None) -> Dataset | None:
    if evaluation is None or WEIGHT not in evaluation.column_names:
        return evaluation
    return evaluation.remove_columns(WEIGHT)


def keeps_order(cfg: DictDefault) -> bool:
    """Whether rows stay in the order of their datasets."""
    return cfg.shuffle_merged_datasets is False or bool(cfg.curriculum_sampling)
