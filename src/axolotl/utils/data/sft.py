"""Data handling specific to SFT: from `datasets` and `test_datasets` of a config to prepared rows.

Per dataset: open, tokenize, length policy, rows without a trained token out. Then: merge, shuffle, drop duplicates, shard,
write to the cache. After that, and not cached: the validation split and the number of steps.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, concatenate_datasets

from axolotl.datasets import TokenizedPromptDataset
from axolotl.exceptions import DatasetError
from axolotl.utils.data import cache, report
from axolotl.utils.data.dedup import drop_duplicates
from axolotl.utils.data.fingerprint import WatchedConfig, changed_read, dataset_key
from axolotl.utils.data.hub_copy import load_pushed, push_prepared
from axolotl.utils.data.lock import hold_lock
from axolotl.utils.data.merge import (
    WEIGHT,
    alike,
    apply_weights,
    keeps_order,
    merge_datasets,
    order_rows,
    without_weights,
)
from axolotl.utils.data.rows import (
    FILTERED,
    add_pose_position_ids,
    apply_length_policy,
    count_trained_tokens,
    select_rows,
    take_rows,
)
from axolotl.utils.data.shared import datasets_with_name_generator, load_dataset_with_config, take_shard
from axolotl.utils.data.source_rows import name_made_row, name_source_rows
from axolotl.utils.data.steps import (
    build_multipack_sampler,
    calculate_total_num_steps,
    num_steps_of_run,
    packing_summary,
)
from axolotl.utils.data.stream import TokenStream
from axolotl.utils.data.streaming import is_streamed, prepare_streaming_dataset
from axolotl.utils.data.synthetic import SYNTHETIC, synthetic_rows
from axolotl.utils.data.token_ids import Embedding, LargestToken, find_largest_token, read_embedding
from axolotl.utils.data.tokenize import dataset_name, tokenize_dataset
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.samplers.utils import get_dataset_lengths
from axolotl.utils.schemas.validation.datasets import EMPTY_TEST_DATASET

LOG = get_logger(__name__)

DEFAULT_PREPARED_PATH = "last_run_prepared"


@dataclass
class Prepared:
    """What preparation gives.

    Attributes:
        train: rows to train on, or a stream of batches of them.
        evaluation: rows held out, or None.
        total_num_steps: optimizer steps of all epochs, at most `max_steps`.
        report: numbers of the training rows (see `report.summarize`), or None for rows that are not prepared.
    """

    train: Dataset | TokenStream
    evaluation: Dataset | None
    total_num_steps: int
    report: dict[str, Any] | None = None


def prepare_datasets(
    cfg: DictDefault, tokenizer: Any, processor: Any = None
) -> tuple[Dataset | TokenStream, Dataset | None, int, list[Any]]:
    """Prepare training and evaluation datasets based on configuration.

    Args:
        cfg: the config. `total_num_tokens`, `total_supervised_tokens` and `sample_packing_eff_est` are filled in.
        tokenizer: the tokenizer of the run.
        processor: the processor of a multimodal model.

    Returns:
        `(train, eval or None, total optimizer steps, prompters)`. The list of prompters is kept for callers that unpack four
        values and is empty: strategies belong to the preparation and are not needed after it.

    Raises:
        DatasetError: a source cannot be read, a row not be tokenized, or nothing is left to train on.
    """
    prepared = prepare(cfg, tokenizer, processor)
    return prepared.train, prepared.evaluation, prepared.total_num_steps, []


def prepare(cfg: DictDefault, tokenizer: Any, processor: Any = None) -> Prepared:
    """As `prepare_datasets`, with the report."""
    if is_streamed(cfg):
        return _streamed(cfg, tokenizer, processor)
    if cfg.skip_prepare_dataset:
        return _raw_datasets(cfg)
    train, summary = prepare_part(cfg, cfg.datasets or [], tokenizer, processor, "train")
    if cfg.test_datasets:
        evaluation = _prepare_test_rows(cfg, tokenizer, processor)
        if cfg.dataset_exact_deduplication:
            evaluation = _without_rows_of(evaluation, train)
    else:
        train, evaluation = split_validation(train, cfg)
        evaluation = _fit_evaluation(evaluation, cfg)
    train, evaluation = apply_weights(train, cfg), without_weights(evaluation)
    packed = build_multipack_sampler(train, cfg) if cfg.sample_packing else None
    total_num_steps = calculate_total_num_steps(cfg, train, packed=packed)
    summary = {
        **summary,
        "rows_to_train": len(train),
        "rows_to_evaluate": len(evaluation or ()),
        "steps": num_steps_of_run(cfg, total_num_steps),
    }
    if packed is not None:
        summary["packing"] = packing_summary(packed)
    report.log_report(summary)
    return Prepared(train, evaluation, total_num_steps, summary)


def _prepare_test_rows(cfg: DictDefault, tokenizer: Any, processor: Any) -> Dataset:
    """The rows of `test_datasets`."""
    if [entry.path for entry in cfg.test_datasets] == [EMPTY_TEST_DATASET]:
        # What stands for an evaluation of the benchmark alone. It has no rows, so there is nothing to download.
        return Dataset.from_dict({column: [] for column in ("input_ids", "labels", "attention_mask", "length")})
    return prepare_part(cfg, cfg.test_datasets, tokenizer, processor, "test")[0]


def _streamed(cfg: DictDefault, tokenizer: Any, processor: Any) -> Prepared:
    """A stream to train on; rows to evaluate on are prepared in advance."""
    evaluation = None
    if cfg.test_datasets:
        evaluation = _prepare_test_rows(cfg, tokenizer, processor)
    return Prepared(prepare_streaming_dataset(cfg, tokenizer, processor), evaluation, int(cfg.max_steps))


def prepare_part(
    cfg: DictDefault, entries: Sequence[DictDefault], tokenizer: Any, processor: Any, part: str
) -> tuple[Dataset, dict[str, Any]]:
    """The rows of `datasets` (`part="train"`) or `test_datasets` (`part="test"`), from the cache or made now.

    Without `dataset_prepared_path` the cache is `last_run_prepared`. What lies there is used only when its key is the same,
    and the key covers all that the rows depend on.
    """
    embedding = read_embedding(cfg, tokenizer)
    dataset, found_report = _find_or_build(cfg, entries, tokenizer, processor, part, embedding)
    if embedding is not None:
        # The rows may have been made for another model with the same tokenizer.
        for entry in found_report["datasets"]:
            embedding.check(entry["name"], LargestToken(**entry["largest_token"]))
    return dataset, found_report


def _find_or_build(
    cfg: DictDefault,
    entries: Sequence[DictDefault],
    tokenizer: Any,
    processor: Any,
    part: str,
    embedding: Embedding | None,
) -> tuple[Dataset, dict[str, Any]]:
    """As `prepare_part`, without a look at the tokens of rows that were made before."""
    root = Path(cfg.dataset_prepared_path or DEFAULT_PREPARED_PATH)
    entries = [DictDefault(entry) for entry in entries]
    key = dataset_key(cfg, entries, tokenizer, part, processor)
    folder = root / key
    rebuild = os.environ.get("AXOLOTL_IS_PREPROCESS") == "1"
    found = None if rebuild else _from_disk(cfg, folder)
    if found is not None:
        LOG.info(f"prepared dataset ({part}) with the same content found in {folder}: {len(found[0]):,} rows")
        return found
    with hold_lock(root / f"{key}.lock"):
        found = None if rebuild else _from_disk(cfg, folder) or _from_hub(cfg, key, embedding)
        if found is not None:
            return found
        with cache.build_folder(root, key) as aside, _scratch(aside):
            watched = WatchedConfig(cfg)
            dataset, found_report = build_rows(watched, entries, tokenizer, processor, part, str(aside), embedding)
            found_report["reads"] = watched.reads_beyond_key()
            cache.save_prepared(dataset, folder, found_report, aside, cfg.num_dataset_shards_to_save)
            del dataset
        LOG.info(f"prepared dataset ({part}) written to {folder}")
        found = _from_disk(cfg, folder)
    if found is None:
        raise DatasetError(f"the prepared dataset in {folder} was damaged right after it was written. Check the disk.")
    if cfg.push_dataset_to_hub:
        push_prepared(found[0], cfg.push_dataset_to_hub, key)
    return found


def _from_disk(cfg: DictDefault, folder: Path) -> tuple[Dataset, dict[str, Any]] | None:
    """The prepared dataset in a folder, if it was made with the values of all keys that its strategies read."""
    found = cache.load_prepared(folder, bool(cfg.dataset_keep_in_memory))
    key = found and changed_read(cfg, found[1].get("reads", {}))
    if found is None or key is None:
        return found
    LOG.info(f"the prepared dataset in {folder} was made with another `{key}`; it is built again.")
    return None


@contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """Intermediate Arrow files go to `folder` and are made anew: only the finished dataset is kept."""
    was_enabled, was_temp = datasets.is_caching_enabled(), tempfile.tempdir
    datasets.disable_caching()
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = was_temp
        if was_enabled:
            datasets.enable_caching()


def _from_hub(cfg: DictDefault, key: str, embedding: Embedding | None) -> tuple[Dataset, dict[str, Any]] | None:
    """The prepared dataset that an earlier run pushed to `push_dataset_to_hub`."""
    pushed = load_pushed(cfg.push_dataset_to_hub, key) if cfg.push_dataset_to_hub else None
    if pushed is None:
        return None
    name = f"`push_dataset_to_hub: {cfg.push_dataset_to_hub}`"
    if embedding is not None:
        embedding.check(name, find_largest_token(pushed, name))
    return pushed, report.summarize(pushed, [])


def build_rows(
    cfg: DictDefault,
    entries: Sequence[DictDefault],
    tokenizer: Any,
    processor: Any,
    part: str,
    cache_dir: str,
    embedding: Embedding | None = None,
) -> tuple[Dataset, dict[str, Any]]:
    """Open, tokenize, filter, merge and order the rows of all entries."""
    prepared, stays, reports = [], [], []
    for entry in datasets_with_name_generator(entries):
        dataset, stay, entry_report = build_entry(cfg, entry, tokenizer, processor, part, cache_dir, embedding)
        reports.append(entry_report)
        stays.append(stay)
        if len(dataset):
            prepared.append(dataset)
    if not prepared:
        raise DatasetError(_nothing_left(reports))
    merged, num_duplicates = merge_datasets(prepared, stays, cfg)
    summary = report.summarize(merged, reports)
    summary["duplicates"] = num_duplicates
    return merged, summary


def _nothing_left(reports: list[dict[str, Any]]) -> str:
    lines = ["no row is left to train on."]
    for entry in reports:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in entry["dropped"].items())
        lines.append(f"dataset {entry['name']}: {entry['rows_read']:,} rows read; dropped: {reasons or 'none'}.")
    lines.append(
        "Rows that are too long: raise `sequence_len` or write `excess_length_strategy: truncate`. Rows without a trained "
        "token: check `type`, the names of the fields and roles, `roles_to_train` and `train_on_inputs`."
    )
    return "\n".join(lines)


def build_entry(
    cfg: DictDefault,
    entry: DictDefault,
    tokenizer: Any,
    processor: Any,
    part: str,
    cache_dir: str,
    embedding: Embedding | None = None,
) -> tuple[Dataset, np.ndarray, dict[str, Any]]:
    """One dataset: its rows as tokens, whether each row that was made stays (bool), and what became of them.

    Raises:
        DatasetError: also for a token that the model's `embedding`, if it is known, has no row for.
    """
    name = dataset_name(entry)
    if entry.type == SYNTHETIC:
        raw: Any = synthetic_rows(entry, cfg, tokenizer)
    else:
        raw = load_dataset_with_config(entry, cfg.hf_use_auth_token, cache_dir=cache_dir)
    if not isinstance(raw, Dataset) or not len(raw):
        raise DatasetError(f"dataset {name} is empty.")
    name_row = name_source_rows(entry, len(raw), int(cfg.seed or 0))
    raw = take_shard(raw, entry, int(cfg.seed or 0))
    rows_read = len(raw)
    if not rows_read:
        no_rows = {"name": name, "rows_read": 0, "rows_made": 0, "rows_kept": 0, "dropped": {}, "truncated": 0}
        no_rows["largest_token"] = asdict(LargestToken())
        return raw, np.zeros(0, dtype=bool), no_rows
    tokens = tokenize_dataset(raw, entry, cfg, tokenizer, processor, name_row)
    num_filtered = tokens.num_filtered if isinstance(tokens, TokenizedPromptDataset) else 0
    rows_made = len(tokens) + num_filtered
    name_of_row = name_row if rows_made == len(tokens) == rows_read else name_made_row
    largest = find_largest_token(tokens, name, name_of_row)
    if embedding is not None:
        embedding.check(name, largest)
    if tokenizer is not None and largest.token >= len(tokenizer):
        LOG.warning(
            f"dataset {name}, {largest.row}: `{largest.column}` has the token {largest.token}, and the tokenizer has "
            f"{len(tokenizer):,} tokens. Were the rows made with another one?"
        )
    tokens = _with_lengths(tokens)
    sequence_len, key = _sequence_len(cfg, part)
    tokens, stay, dropped, truncated = apply_length_policy(
        tokens,
        name,
        sequence_len=sequence_len,
        min_len=2 if cfg.min_sample_len is None else int(cfg.min_sample_len),
        strategy=cfg.excess_length_strategy or "drop",
        key=key,
        name_row=name_of_row,
    )
    if "labels" in tokens.column_names:
        untrained = stay & (count_trained_tokens(tokens) == 0)
        if untrained.any():
            dropped["without a trained token"] = int(untrained.sum())
            stay &= ~untrained
    tokens = select_rows(tokens, stay)
    if num_filtered:
        dropped[FILTERED] = num_filtered
    if cfg.use_pose:
        tokens = _with_pose(tokens, cfg)
    if part == "train" and len(tokens) and any(other.weight is not None for other in cfg.datasets or []):
        tokens = tokens.add_column(WEIGHT, np.full(len(tokens), entry.weight or 1.0))
    for reason, count in dropped.items():
        LOG.warning(f"dataset {name}: {count:,} of {rows_made:,} rows dropped: {reason}")
    if truncated:
        LOG.warning(f"dataset {name}: {truncated:,} of {rows_made:,} rows cut to {sequence_len} tokens")
    return (
        tokens,
        stay,
        {
            "name": name,
            "rows_read": rows_read,
            "rows_made": rows_made,
            "rows_kept": len(tokens),
            "dropped": dropped,
            "truncated": truncated,
            "largest_token": asdict(largest),
        },
    )


def _sequence_len(cfg: DictDefault, part: str) -> tuple[int, str]:
    if part == "test" and cfg.eval_sequence_len:
        return int(cfg.eval_sequence_len), "eval_sequence_len"
    return int(cfg.sequence_len or 512), "sequence_len"


def _with_lengths(dataset: Dataset) -> Dataset:
    lengths = get_dataset_lengths(dataset.remove_columns("length") if "length" in dataset.column_names else dataset)
    if "length" in dataset.column_names:
        dataset = dataset.remove_columns("length")
    return dataset.add_column("length", lengths.astype(np.int32))


def _with_pose(dataset: Dataset, cfg: DictDefault) -> Dataset:
    """Positions for PoSE. The draws of a row depend on `seed` and the row alone, not on the number of processes."""

    def with_positions(row: dict[str, Any], index: int) -> dict[str, Any]:
        random.seed(f"{cfg.seed}:{index}")
        row = add_pose_position_ids(
            row,
            max_context_len=int(cfg.pose_max_context_len or 32768),
            split_on_token_ids=cfg.pose_split_on_token_ids,
            chunks=int(cfg.pose_num_chunks or 2),
        )
        return {"position_ids": row["position_ids"]}

    state = random.getstate()
    try:
        return dataset.map(with_positions, with_indices=True, desc="Adding PoSE positions")
    finally:
        random.setstate(state)


def split_validation(dataset: Dataset, cfg: DictDefault) -> tuple[Dataset, Dataset | None]:
    """Set the last rows aside for evaluation: a share (`val_set_size` up to 1) or a number of rows.

    They are those of `dataset.train_test_split(shuffle=False)`: the rows are shuffled already, unless they are to keep their order.
    """
    size = float(cfg.val_set_size or 0)
    if size <= 0:
        return dataset, None
    num_eval = math.ceil(size * len(dataset)) if size <= 1 else int(size)
    num_train = len(dataset) - num_eval
    if num_train <= 0:
        raise DatasetError(
            f"`val_set_size: {cfg.val_set_size}` takes {num_eval:,} rows, but there are only {len(dataset):,}: none would be "
            "left to train on. Write a smaller number."
        )
    if keeps_order(cfg):
        LOG.warning(
            f"the rows keep their order, so `val_set_size: {cfg.val_set_size}` holds out the last {num_eval:,} of them, which may "
            "all be of one kind. To choose others, write `test_datasets`."
        )
    return dataset.select(range(num_train)), dataset.select(range(num_train, len(dataset)))


def _fit_evaluation(evaluation: Dataset | None, cfg: DictDefault) -> Dataset | None:
    """Rows split off for evaluation, held to `eval_sequence_len` when it is shorter than `sequence_len`."""
    if evaluation is None or not cfg.eval_sequence_len or cfg.eval_sequence_len >= (cfg.sequence_len or 512):
        return evaluation
    fitted, stay, dropped, truncated = apply_length_policy(
        evaluation,
        "for evaluation",
        sequence_len=int(cfg.eval_sequence_len),
        min_len=0,
        strategy=cfg.excess_length_strategy or "drop",
        key="eval_sequence_len",
    )
    LOG.warning(f"evaluation: {sum(dropped.values()):,} rows dropped, {truncated:,} cut (`eval_sequence_len`)")
    return select_rows(fitted, stay)


def _without_rows_of(evaluation: Dataset, train: Dataset) -> Dataset:
    kept, num_dropped = drop_duplicates(evaluation, before=train)
    LOG.info(f"{num_dropped:,} rows of `test_datasets` are in `datasets` too and were dropped")
    return kept


def _raw_datasets(cfg: DictDefault) -> Prepared:
    """`skip_prepare_dataset: true`: rows as their sources hold them; collators make tokens of them."""

    def read(entries: Sequence[DictDefault]) -> Dataset:
        opened = [
            take_shard(load_dataset_with_config(entry, cfg.hf_use_auth_token), entry, int(cfg.seed or 0))
            for entry in datasets_with_name_generator([DictDefault(entry) for entry in entries])
        ]
        rows = opened[0] if len(opened) == 1 else concatenate_datasets(alike(opened))
        return take_rows(rows, order_rows([np.ones(len(dataset), dtype=bool) for dataset in opened], cfg))

    train = read(cfg.datasets or [])
    if cfg.test_datasets:
        evaluation: Dataset | None = read(cfg.test_datasets)
    else:
        train, evaluation = split_validation(train, cfg)
    unpacked = DictDefault({**cfg, "sample_packing": False})
    return Prepared(train, evaluation, calculate_total_num_steps(unpacked, train, update=False))
