"""Evaluate a model on training and validation datasets."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.utils.data import IterableDataset

from axolotl.core.checkpoint import list_checkpoints
from axolotl.core.output_dir import check_output_dir
from axolotl.exceptions import ConfigError, ModelError
from axolotl.train import setup_model_and_trainer, trackers_told_how_it_ends
from axolotl.utils.callbacks.build import check_evaluation
from axolotl.utils.callbacks.trackers import check_trackers
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.distributed import get_rank
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

SUMMARY = "eval_summary.csv"
# Figures of the trainer that say nothing about a model: steps are counted as if nothing were packed.
NOT_METRICS = ("epoch", "model_preparation_time", "steps_per_second")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")


def evaluate(*, cfg: DictDefault, dataset_meta: Any) -> dict[str, float]:
    """Evaluate the trained result on training and validation set, print and write `eval_summary.csv`.

    What is evaluated: the adapter in `lora_model_dir`, else the adapter or model in `output_dir`, else, without `adapter`, the
    base model.

    Args:
        cfg: the resolved config.
        dataset_meta: `TrainDatasetMeta`.

    Returns:
        Metrics, named `train_...` and `eval_...`.
    """
    check_trackers(cfg, is_main_process=get_rank() == 0)
    check_evaluation(cfg)
    check_output_dir(cfg.output_dir)
    choose_trained_result(cfg)
    trainer, _, _, _, _ = setup_model_and_trainer(cfg, dataset_meta)
    with trackers_told_how_it_ends(trainer):
        train_metrics = evaluate_dataset(trainer, dataset_meta.train_dataset, "train", cfg.flash_optimum)
        eval_metrics = evaluate_dataset(trainer, dataset_meta.eval_dataset, "eval", cfg.flash_optimum)
    if train_metrics is None and eval_metrics is None:
        raise ConfigError(
            "There is nothing to evaluate: neither `datasets` nor `test_datasets` or `val_set_size` gave rows."
        )
    if get_rank() == 0:
        rows = summary_rows(train_metrics or {}, eval_metrics or {})
        write_summary(Path(cfg.output_dir) / SUMMARY, rows)
        print_summary(rows)
    return {**(train_metrics or {}), **(eval_metrics or {})}


def check_trained_result(cfg: DictDefault) -> None:
    """Raise `ModelError` where a config has an adapter and none was trained: a fresh one would be no result of anything."""
    output_dir = Path(cfg.output_dir)
    if not cfg.adapter or cfg.lora_model_dir or any((output_dir / name).is_file() for name in ADAPTER_FILES):
        return
    checkpoints = list_checkpoints(output_dir)
    hint = f" The run has a checkpoint: `--lora-model-dir {checkpoints[-1]}`." if checkpoints else ""
    switches = "".join(f" --no-{key.replace('_', '-')}" for key in ("load_in_4bit", "load_in_8bit") if cfg[key])
    raise ModelError(
        f"`adapter: {cfg.adapter}`, but `output_dir: {cfg.output_dir}` holds no trained adapter. Train first, or say where the "
        f"adapter is with `--lora-model-dir`.{hint} To evaluate the base model alone, give `--adapter null{switches}`."
    )


def choose_trained_result(cfg: DictDefault) -> None:
    """Point the config at what was trained, and say so.

    Raises:
        ModelError: the config has an adapter, and none was trained.
    """
    check_trained_result(cfg)
    output_dir = Path(cfg.output_dir)
    if cfg.adapter:
        named = bool(cfg.lora_model_dir)
        cfg.lora_model_dir = cfg.lora_model_dir or str(output_dir)
        chosen = cfg.lora_model_dir
        reason = "the adapter that the config names" if named else "the adapter that was trained"
    elif any((output_dir / name).is_file() for name in MODEL_FILES):
        cfg.base_model = str(output_dir)
        chosen, reason = str(output_dir), "the model that was trained"
    else:
        chosen, reason = cfg.base_model, f"the base model; `output_dir: {cfg.output_dir}` has no trained one"
        if checkpoints := list_checkpoints(output_dir):
            LOG.warning(f"The run has a checkpoint, which is not evaluated: `--base-model {checkpoints[-1]}` would be.")
    note_choice(cfg, "evaluated model", chosen, reason)
    LOG.info(f"Evaluating {chosen}: {reason}.")


def evaluate_dataset(
    trainer: Any, dataset: Any, dataset_type: str, flash_optimum: bool = False
) -> dict[str, float] | None:
    """Helper function to evaluate a single dataset.

    Args:
        trainer: the trainer.
        dataset: rows, or None.
        dataset_type: `train` or `eval`; prefix of the metrics.
        flash_optimum: not needed; part of the documented signature.

    Returns:
        Metrics such as `eval_loss`, or None without a dataset.
    """
    if dataset is None:
        return None
    if isinstance(dataset, IterableDataset):
        LOG.info(f"The {dataset_type} set is streamed and has no end, so it is not evaluated on.")
        return None
    LOG.info(f"Evaluating on the {dataset_type} set.")
    metrics = trainer.evaluate(dataset, metric_key_prefix=dataset_type)
    if f"{dataset_type}_loss" in metrics:
        from axolotl.core.trainers.base import perplexity

        metrics[f"{dataset_type}_ppl"] = perplexity(metrics[f"{dataset_type}_loss"])
    return metrics


def summary_rows(train_metrics: dict[str, Any], eval_metrics: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(metric, training, validation), with an empty text where a set lacks the metric."""
    training = {key.removeprefix("train_"): value for key, value in train_metrics.items()}
    validation = {key.removeprefix("eval_"): value for key, value in eval_metrics.items()}
    names = [name for name in [*training, *(n for n in validation if n not in training)] if name not in NOT_METRICS]
    return [(name, training.get(name, ""), validation.get(name, "")) for name in names]


def write_summary(path: Path, rows: list[tuple[str, Any, Any]]) -> None:
    """The CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("metric", "training", "validation"))
        writer.writerows(rows)


def print_summary(rows: list[tuple[str, Any, Any]]) -> None:
    """The same as a table."""
    table = Table(title="Evaluation", title_justify="left", box=None, pad_edge=False)
    for column in ("metric", "training", "validation"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, training, validation in rows:
        table.add_row(name, _short(training), _short(validation))
    Console().print(table)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
