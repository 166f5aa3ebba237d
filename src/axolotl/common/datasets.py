"""Dataset loading utilities."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from axolotl.exceptions import NotBuiltError
from axolotl.loaders import load_tokenizer
from axolotl.utils.data.report import print_report, write_html_report
from axolotl.utils.data.sft import DEFAULT_PREPARED_PATH, Prepared, prepare
from axolotl.utils.data.stream import TokenStream
from axolotl.utils.data.token_ids import find_largest_token, holds_token_ids, read_embedding
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.tokenization import check_dataset_labels

LOG = get_logger(__name__)


@dataclass
class TrainDatasetMeta:
    """Training and evaluation rows, and how long training on them takes.

    Attributes:
        train_dataset: prepared rows, or a stream of batches of them.
        eval_dataset: rows held out, or None.
        total_num_steps: optimizer steps of all epochs, at most `max_steps`; None when unknown.
        report: numbers of the training rows: lengths, trained tokens, what was dropped and why, packing.
    """

    train_dataset: Dataset | TokenStream
    eval_dataset: Dataset | None = None
    total_num_steps: int | None = None
    report: dict[str, Any] | None = None


def sample_dataset(dataset: Dataset, num_samples: int) -> Dataset:
    """Randomly sample `num_samples` samples with replacement from `dataset`."""
    return dataset.select([random.randrange(len(dataset)) for _ in range(num_samples)])


def load_datasets(*, cfg: DictDefault, cli_args: Any = None, debug: bool = False) -> TrainDatasetMeta:
    """Load one or more training or evaluation datasets, calling `axolotl.utils.data.prepare_datasets`. Optionally, show rows.

    Args:
        cfg: the config.
        cli_args: `debug`, `debug_text_only` and `debug_num_examples` are read, where they exist.
        debug: show rows token by token, trained tokens coloured, and write the dataset report as HTML.

    Returns:
        Rows to train on and to evaluate on, and the number of optimizer steps.
    """
    tokenizer = load_tokenizer(cfg)
    prepared = prepare(cfg, tokenizer, processor=_load_processor(cfg, tokenizer))
    options = vars(cli_args) if cli_args is not None and hasattr(cli_args, "__dict__") else {}
    if debug or options.get("debug"):
        _show(cfg, prepared, tokenizer, options)
    return TrainDatasetMeta(prepared.train, prepared.evaluation, prepared.total_num_steps, prepared.report)


def check_given_rows(*, cfg: DictDefault, dataset_meta: TrainDatasetMeta) -> None:
    """Look at rows that a plugin gives, which are not prepared here.

    Raises:
        DatasetError: one has a number that stands for no token of the model.
    """
    given = {
        "`train_dataset` of a plugin": dataset_meta.train_dataset,
        "`eval_dataset` of a plugin": dataset_meta.eval_dataset,
    }
    largest = {
        name: find_largest_token(rows, name)
        for name, rows in given.items()
        if isinstance(rows, Dataset) and holds_token_ids(rows)
    }
    embedding = read_embedding(cfg, load_tokenizer(cfg)) if largest else None
    for name, token in largest.items() if embedding is not None else ():
        embedding.check(name, token)


def _load_processor(cfg: DictDefault, tokenizer: Any) -> Any:
    if not cfg.processor_type:
        return None
    # It brings the image processors of transformers, and with them the models.
    from axolotl.loaders import load_processor

    return load_processor(cfg, tokenizer)


def _show(cfg: DictDefault, prepared: Prepared, tokenizer: Any, options: dict[str, Any]) -> None:
    num_examples = int(options.get("debug_num_examples") or 1)
    if isinstance(prepared.train, TokenStream):
        examples = Dataset.from_list(prepared.train.first_rows(num_examples))
    elif "labels" in prepared.train.column_names:
        examples = sample_dataset(prepared.train, num_examples)
    else:
        return
    check_dataset_labels(examples, tokenizer, num_examples=num_examples, text_only=bool(options.get("debug_text_only")))
    if prepared.report:
        print_report(prepared.report)
        path = Path(cfg.dataset_prepared_path or DEFAULT_PREPARED_PATH) / "dataset_report.html"
        write_html_report(path, prepared.report, examples, tokenizer)
        LOG.info(f"dataset report written to {path}")


def load_preference_datasets(*, cfg: DictDefault, cli_args: Any = None) -> TrainDatasetMeta:
    """Load preference datasets for RL training.

    Raises:
        NotBuiltError: always; methods that learn from preferences are not implemented here yet.
    """
    del cli_args
    raise NotBuiltError(f"`rl: {cfg.rl}` needs preference datasets, which are not implemented yet. Remove `rl`.")
