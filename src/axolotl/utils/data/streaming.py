"""Data handling specific to streaming datasets.

In: `pretraining_dataset`, or `datasets` with `streaming: true`. Out: a `TokenStream`, whose batches are read, tokenized and
packed while training. `stream_sources` opens and reads datasets, `stream_mix` takes turns between them, `stream_rows` says
which rows stay, `stream` makes batches of them, `stream_loader` deals them out to ranks and workers and keeps the position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from axolotl import prompt_strategies
from axolotl.datasets import TokenizeRows
from axolotl.exceptions import ConfigError
from axolotl.prompt_strategies.pretrain import PretrainTokenizationStrategy
from axolotl.prompters import Prompter
from axolotl.utils.data.shared import read_shard
from axolotl.utils.data.stream import BlockPlan, TokenStream
from axolotl.utils.data.stream_mix import StreamMix
from axolotl.utils.data.stream_rows import RowPolicy, as_token_rows, join_texts
from axolotl.utils.data.stream_sources import StreamSource, open_sources
from axolotl.utils.data.token_ids import read_embedding
from axolotl.utils.data.tokenize import dataset_name
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.samplers.geometry import packing_geometry

LOG = get_logger(__name__)


def is_streamed(cfg: DictDefault) -> bool:
    """Whether the rows of a run are read while it trains."""
    return bool(cfg.pretraining_dataset or cfg.streaming)


def prepare_streaming_dataset(cfg: DictDefault, tokenizer: Any, processor: Any = None) -> TokenStream:
    """The stream that a config asks for.

    Args:
        cfg: the config.
        tokenizer: the tokenizer of the run.
        processor: the processor of a multimodal model.

    Raises:
        DatasetError: a source cannot be opened.
        ConfigError: a `type` is unknown.
    """
    if cfg.pretraining_dataset and cfg.datasets:
        LOG.warning("`pretraining_dataset` is set, so `datasets` is not trained on. Remove one of them.")
    entries = [_text_entry(DictDefault(entry)) for entry in cfg.pretraining_dataset or cfg.datasets or []]
    opened = open_sources(entries, seed=_order_seed(cfg), use_auth_token=cfg.hf_use_auth_token)
    return _build_stream(opened, cfg, tokenizer, processor)


def wrap_streaming_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: Any,
    cfg: DictDefault,
    dataset_config: Mapping[str, Any] | None = None,
) -> TokenStream:
    """A dataset that is open already as a stream of batches of tokenized rows.

    Args:
        dataset: the rows.
        tokenizer: the tokenizer of the run.
        cfg: the config; the packing, length and shuffle keys are read.
        dataset_config: how its rows are tokenized; the first entry of `pretraining_dataset` or `datasets` by default.
    """
    first = dataset_config or next(iter(cfg.pretraining_dataset or cfg.datasets or [{"type": "pretrain"}]))
    entry = _text_entry(DictDefault(first))
    rows = dataset.to_iterable_dataset() if isinstance(dataset, Dataset) else dataset
    source = StreamSource(rows, dataset_name(entry), seed=_order_seed(cfg))
    return _build_stream([(entry, source)], cfg, tokenizer)


def encode_streaming(
    examples: Mapping[str, Sequence[str]],
    tokenizer: Any,
    max_tokens: int,
    text_column: str = "text",
    concatenate: bool = True,
) -> dict[str, list[list[int]]]:
    """Tokens of texts, each with EOS. A text that is too long is continued in the next row.

    Args:
        examples: columns.
        tokenizer: its EOS ends a text, its pad token stands between texts.
        max_tokens: tokens per row.
        text_column: column of the texts.
        concatenate: put texts one after the other, a pad token after each, into rows of exactly `max_tokens`; a text is not
            divided to fill a row. Otherwise every text has rows of its own, which are not padded.

    Returns:
        `input_ids`, `attention_mask` and `labels`. Pad tokens have attention 0 and label -100.
    """
    max_length = max_tokens - 1 if concatenate else max_tokens
    strategy = PretrainTokenizationStrategy(
        Prompter(), tokenizer, sequence_len=max_tokens, text_column=text_column, max_length=max_length, overlap=0
    )
    made = strategy.tokenize_prompt({text_column: list(examples[text_column])})
    if not concatenate:
        return made
    rows = join_texts(as_token_rows(made, "of texts"), max_tokens, _pad_token(tokenizer), fill=True)
    return {key: [row[key].tolist() for row in rows] for key in ("input_ids", "attention_mask", "labels")}


def _build_stream(
    opened: Sequence[tuple[DictDefault, StreamSource]], cfg: DictDefault, tokenizer: Any, processor: Any = None
) -> TokenStream:
    strategies = [_strategy(entry, cfg, tokenizer, processor) for entry, _ in opened]
    weighted = any(entry.weight is not None for entry, _ in opened)
    weights = [1.0 if entry.weight is None else float(entry.weight) for entry, _ in opened] if weighted else None
    mix = StreamMix([source for _, source in opened], weights)
    policy = RowPolicy(
        sequence_len=int(cfg.sequence_len or 512),
        min_len=2 if cfg.min_sample_len is None else int(cfg.min_sample_len),
        strategy=cfg.excess_length_strategy or "drop",
        pose=_pose(cfg),
        seed=int(cfg.seed or 0),
    )
    joins = bool(cfg.pretraining_sample_concatenation) and not cfg.sample_packing
    plan = BlockPlan(
        num_rows=int(cfg.streaming_multipack_buffer_size or 10_000),
        seed=int(cfg.seed or 0),
        shuffle=_is_shuffled(cfg),
        batch_rows=int(cfg.micro_batch_size or 1),
        packing=packing_geometry(cfg) if cfg.sample_packing else None,
        bin_size=int(cfg.sample_packing_bin_size or 200),
        sequential=bool(cfg.sample_packing_sequentially),
        join_to=int(cfg.sequence_len or 512) if joins else None,
        pad_token_id=_pad_token(tokenizer) if joins else 0,
    )
    return TokenStream(mix, strategies, policy, plan, read_shard(cfg), read_embedding(cfg, tokenizer))


def _strategy(entry: DictDefault, cfg: DictDefault, tokenizer: Any, processor: Any) -> TokenizeRows | None:
    if not entry.type:
        return None
    strategy = prompt_strategies.load(entry.type, tokenizer, cfg, entry, processor=processor)
    if not hasattr(strategy, "tokenize_prompt"):
        raise ConfigError(
            f"`type: {entry.type}` of dataset {dataset_name(entry)} tokenizes a whole dataset (`wrap_dataset`) and no single "
            "rows (`tokenize_prompt`), so it cannot be streamed. Remove `streaming: true`."
        )
    return TokenizeRows(strategy, str(entry.path))


def _text_entry(entry: DictDefault) -> DictDefault:
    """`text_column` and `field` mean the same: the column of the text."""
    column = entry.field or entry.text_column
    return DictDefault({**entry, "field": column, "text_column": column}) if column else entry


def _is_shuffled(cfg: DictDefault) -> bool:
    return cfg.shuffle_merged_datasets is not False and not cfg.curriculum_sampling


def _order_seed(cfg: DictDefault) -> int | None:
    return int(cfg.seed or 0) if _is_shuffled(cfg) else None


def _pad_token(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError("joining texts needs a pad token. Write `special_tokens: {pad_token: <pad>}`.")


def _pose(cfg: DictDefault) -> dict[str, Any] | None:
    if not cfg.use_pose:
        return None
    return {
        "max_context_len": int(cfg.pose_max_context_len or 32768),
        "split_on_token_ids": cfg.pose_split_on_token_ids,
        "chunks": int(cfg.pose_num_chunks or 2),
    }
