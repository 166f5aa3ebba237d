"""A stream of batches of tokenized rows that can be stopped anywhere and gone on with at the next batch.

    sources -> mix -> rows of this reader -> block -> tokens -> length policy -> shuffle -> bins or rows -> batches

Rows are read in blocks. The rows of a block, their order and their bins follow from the position of the stream before it and
the seed, so a position is enough to make the block again: (position before the block, batches of it that were given out).
No buffer has to be saved, and none is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from axolotl.datasets import TokenizeRows
from axolotl.exceptions import DatasetError
from axolotl.prompt_tokenizers import PromptTokenizingStrategy, name_row
from axolotl.utils.data.rows import FILTERED
from axolotl.utils.data.source_rows import name_made_row
from axolotl.utils.data.stream_mix import Draw, StreamMix
from axolotl.utils.data.stream_rows import RowPolicy, TokenRow, as_token_rows, count, join_texts, take_token_row
from axolotl.utils.data.token_ids import Embedding, check_row_tokens
from axolotl.utils.data.tokenize import TOKEN_COLUMNS
from axolotl.utils.samplers.geometry import PackingGeometry
from axolotl.utils.samplers.multipack import MultipackBatchSampler

ROWS_PER_CALL = 256
"""Rows tokenized at a time."""

ROWS_OF_FIRST_BLOCK = 1024
"""Blocks double from here to their full size, so that training starts after a moment."""

TOKENS_PER_BLOCK = 1 << 24
"""A block with this many tokens ends early, so that long texts do not fill the memory."""

Batch = list[TokenRow] | list[list[TokenRow]]


@dataclass(frozen=True)
class BlockPlan:
    """How blocks are made and cut into batches.

    Attributes:
        num_rows: source rows per block: what is shuffled and packed together.
        seed: of the order in a block.
        shuffle: False keeps the order of the sources.
        batch_rows: rows of a batch that is not packed.
        packing: bins of a packed batch, or None.
        bin_size: rows per bin at most.
        sequential: fill bins in order.
        join_to: put texts of a block one after the other into rows of this many tokens; None leaves them apart.
        pad_token_id: stands between joined texts.
    """

    num_rows: int = 10_000
    seed: int = 0
    shuffle: bool = True
    batch_rows: int = 1
    packing: PackingGeometry | None = None
    bin_size: int = 200
    sequential: bool = False
    join_to: int | None = None
    pad_token_id: int = 0


@dataclass
class Block:
    """Rows between two positions of a reader."""

    rows: list[TokenRow] = field(default_factory=list)
    num_tokens: int = 0


class TokenStream(IterableDataset):
    """Batches without end.

    Iterating the stream itself gives the batches of a single reader; `read` gives those of one of several.

    Args:
        mix: the sources.
        strategies: per source, what tokenizes its rows; None for rows that are tokens.
        policy: which tokenized rows stay.
        plan: blocks and batches.
        shard: `(n, i)` takes part i of n of the rows.
        embedding: the model's, which must have a row for every token; None where it is not known.
    """

    def __init__(
        self,
        mix: StreamMix,
        strategies: Sequence[TokenizeRows | None],
        policy: RowPolicy,
        plan: BlockPlan,
        shard: tuple[int, int] = (1, 0),
        embedding: Embedding | None = None,
    ):
        self.mix = mix
        self.strategies = list(strategies)
        self.policy = policy
        self.plan = plan
        self.shard = shard
        self.embedding = embedding
        self._looked_at: set[int] = set()  # sources whose first rows were

    def __iter__(self) -> Iterator[Batch]:
        for batch, _ in self.read():
            yield batch

    @property
    def source_names(self) -> list[str]:
        return [source.name for source in self.mix.sources]

    @property
    def layout(self) -> str:
        """What decides which rows make which batch, besides the position: batches cannot be counted on when it changes."""
        return repr((self.plan, self.policy, self.shard))

    def first_rows(self, num_rows: int) -> list[dict[str, list[int]]]:
        """The first rows of the stream, for people to look at."""
        rows: list[TokenRow] = []
        for batch in self:
            rows += [row for part in batch for row in (part if isinstance(part, list) else [part])]
            if len(rows) >= num_rows:
                break
        return [{key: value.tolist() for key, value in row.items()} for row in rows[:num_rows]]

    def start(self) -> dict[str, Any]:
        """The position before the first batch."""
        sources = [{"pass": 0, "row": 0, "read": None, "taken": 0} for _ in self.mix.sources]
        mix = {"drawn": 0, "turns": [0] * len(sources), "waiting": [], "sources": sources}
        return {"mix": mix, "block": 0, "batch": 0, "dropped": {}}

    def read(
        self, reader: int = 0, num_readers: int = 1, position: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """The batches of one reader from a position on, each with the position after it.

        Args:
            reader: which reader, from 0.
            num_readers: readers that share the rows. Together they get every row that one would.
            position: as given with a batch of this reader; from the beginning by default.

        Raises:
            DatasetError: a row cannot be tokenized, or pass after pass none is left.
        """
        position = dict(position or self.start())
        self.mix.load_state_dict(position["mix"])
        number, done = int(position["block"]), int(position["batch"])
        dropped = _copy_counts(position["dropped"])
        last_pass_with_rows = self._passes()
        while True:
            before = {"mix": self.mix.state_dict(), "block": number, "dropped": _copy_counts(dropped)}
            num_rows = min(self.plan.num_rows, ROWS_OF_FIRST_BLOCK << min(number, 20))
            block = self._read_block(num_rows, reader, num_readers, dropped)
            for index, batch in enumerate(self._batches(block, reader, number), 1):
                if index > done:
                    # `dropped_now` tells what was dropped so far; `dropped` is that before the block, which is made again.
                    yield batch, {**before, "batch": index, "dropped_now": dropped}
            if block.rows:
                last_pass_with_rows = self._passes()
            elif self._passes() > last_pass_with_rows + num_readers:
                raise DatasetError(nothing_left(self.source_names, dropped))
            number, done = number + 1, 0

    def _read_block(self, num_rows: int, reader: int, num_readers: int, dropped: dict[str, dict[str, int]]) -> Block:
        """The reader's next rows. A block does not reach over the end of a pass."""
        block, drawn, pending, pass_ended = Block(), 0, [], False
        while drawn < num_rows and block.num_tokens < TOKENS_PER_BLOCK and not pass_ended:
            draw = self.mix.next()
            if draw is None:
                pass_ended = True
            elif draw.is_for(reader, num_readers, self.shard):
                pending.append(draw)
                drawn += 1
            if len(pending) >= ROWS_PER_CALL or pass_ended or drawn == num_rows:
                self._tokenize(pending, block, dropped)
                pending = []
        return block

    def _passes(self) -> int:
        """How often all sources were read to their end."""
        return min(source.passes for source in self.mix.sources)

    def _tokenize(self, draws: list[Draw], block: Block, dropped: dict[str, dict[str, int]]) -> None:
        """Add the tokens of drawn rows to a block."""
        for group in self._groups(draws):
            source = group[0].source
            name = self.mix.sources[source].name
            counts = dropped.setdefault(name, {})
            rows = [draw.content for draw in group]
            numbers = [draw.row for draw in group]
            if source not in self._looked_at:
                self._looked_at.add(source)
                _look_at(self.strategies[source], rows, name)
            made = tokenize_rows(self.strategies[source], numbers, rows, name, counts)
            # A strategy may make several rows of one, or none.
            name_of_row = (
                (lambda index, numbers=numbers: name_row(numbers[index])) if len(made) == len(rows) else name_made_row
            )
            check_row_tokens(made, name, self.embedding, name_of_row)
            kept = self.policy.apply(made, name, counts)
            block.rows += kept
            block.num_tokens += sum(len(row["input_ids"]) for row in kept)

    def _groups(self, draws: list[Draw]) -> Iterator[list[Draw]]:
        """Rows that one strategy may tokenize together. Unless they are shuffled anyway, the order stays."""
        if self.plan.shuffle:
            for source in range(len(self.mix.sources)):
                group = [draw for draw in draws if draw.source == source]
                if group:
                    yield group
            return
        start = 0
        for stop in range(1, len(draws) + 1):
            if stop == len(draws) or draws[stop].source != draws[start].source:
                yield draws[start:stop]
                start = stop

    def _batches(self, block: Block, reader: int, number: int) -> Iterator[Batch]:
        plan, rows = self.plan, block.rows
        order = np.arange(len(rows))
        if plan.shuffle:
            order = np.random.default_rng((plan.seed, reader, number)).permutation(len(rows))
        if plan.join_to:
            rows = join_texts([rows[index] for index in order], plan.join_to, plan.pad_token_id)
            order = np.arange(len(rows))
        if plan.packing is None:
            for start in range(0, len(order), plan.batch_rows):
                yield [rows[index] for index in order[start : start + plan.batch_rows]]
            return
        if not rows:
            return
        sampler = MultipackBatchSampler(
            order.tolist(),
            batch_size=plan.packing.num_rows,
            batch_max_len=plan.packing.capacity,
            lengths=np.array([len(row["input_ids"]) for row in rows]),
            drop_last=False,
            sequential=plan.sequential,
            bin_size=plan.bin_size,
            one_row=plan.packing.one_row,
        )
        for bins in sampler:
            batch = [[rows[index] for index in bin_] for bin_ in bins]
            # The last batch of a block may have fewer bins; empty ones, which are padding, keep its shape.
            yield batch + [[] for _ in range(0 if plan.packing.one_row else plan.packing.num_rows - len(batch))]


def _look_at(tokenize: TokenizeRows | None, rows: list[dict[str, Any]], name: str) -> None:
    """Warn of properties that the config names and that the first rows of a source do not have."""
    strategy = None if tokenize is None else tokenize.strategy
    if isinstance(strategy, PromptTokenizingStrategy) and strategy.named_properties is not None:
        strategy.named_properties.warn_of_missing(rows, name)


def tokenize_rows(
    strategy: TokenizeRows | None,
    numbers: list[int],
    rows: Sequence[Mapping[str, Any]],
    name: str,
    counts: dict[str, int],
) -> list[TokenRow]:
    """Tokens of some rows of a source. Rows that are tokens already are taken as they are.

    Rows that the strategy leaves out are added to `counts`.
    """
    if TOKEN_COLUMNS.issubset(rows[0]):
        pairs = zip(rows, numbers, strict=True)
        return [token_row for row, number in pairs for token_row in take_token_row(row, number, name)]
    if strategy is None:
        raise DatasetError(
            f"dataset {name} has no `type`, and its rows hold no `input_ids` and `labels` (fields: {', '.join(rows[0])}). "
            "Write a `type`, such as `completion` or `chat_template`."
        )
    keep = strategy.strategy.filter_rows
    if keep is not None:
        chosen = [index for index, row in enumerate(rows) if keep(row)]
        if len(chosen) < len(rows):
            count(counts, FILTERED, len(rows) - len(chosen))
        numbers, rows = [numbers[index] for index in chosen], [rows[index] for index in chosen]
    if not rows:
        return []
    if strategy.strategy.supports_batched:
        return as_token_rows(strategy({key: [row.get(key) for row in rows] for key in _fields(rows)}, numbers), name)
    made = [strategy(dict(row), number) for number, row in zip(numbers, rows, strict=True)]
    return [token_row for row in made for token_row in as_token_rows(row, name)]


def nothing_left(names: Sequence[str], dropped: Mapping[str, Mapping[str, int]]) -> str:
    """Why a stream has no rows."""
    lines = ["no row of the stream is left to train on."]
    for name in names:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.get(name, {}).items())
        lines.append(f"dataset {name}: dropped: {reasons or 'none'}.")
    lines.append("Check `type`, the names of fields and roles, `sequence_len`, `shards`, `split` and `skip`.")
    return "\n".join(lines)


def _fields(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _copy_counts(counts: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    return {name: dict(reasons) for name, reasons in counts.items()}
