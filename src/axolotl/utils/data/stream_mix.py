"""Several sources as one stream: which one gives the next row.

Sources take turns in proportion to their weights. Every reader of a stream draws the same rows in the same order; which of
them it keeps is decided later, so readers need not talk to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from axolotl.utils.data.stream_sources import Row, StreamSource


@dataclass(frozen=True)
class Draw:
    """A row of a mix.

    Attributes:
        source: index of the source.
        row: number of the row in the source.
        content: the row.
        place: the row among those that the source gives, shifted by the source, so that sources of one row do not all
            begin with the same reader.
        passes: how often the source was read to its end before.
    """

    source: int
    row: int
    content: Row
    place: int
    passes: int

    def is_for(self, reader: int, num_readers: int, shard: tuple[int, int] = (1, 0)) -> bool:
        """Whether the row is dealt to a reader. In the next pass it goes to the next reader; its shard stays.

        Args:
            reader: which reader, from 0.
            num_readers: readers that share the rows of a shard.
            shard: `(n, i)`: only part i of n of the rows is read at all.
        """
        parts, part = shard
        return self.place % parts == part and (self.place // parts + self.passes) % num_readers == reader


class StreamMix:
    """The rows of several sources, in turns.

    Without weights all sources take equal turns; one that has ended waits until all have, so that a pass over the mix gives
    every row once. With weights the shares are kept: a source that has ended starts over at once.

    Args:
        sources: at least one.
        weights: turns relative to each other, or None.
    """

    def __init__(self, sources: Sequence[StreamSource], weights: Sequence[float] | None = None):
        self.sources = list(sources)
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.drawn = 0
        self.turns = [0] * len(self.sources)
        self.waiting: list[int] = []

    def next(self) -> Draw | None:
        """The next row; None at the end of a pass over all sources (never with weights)."""
        while True:
            index = self._whose_turn()
            source = self.sources[index]
            found = source.next()
            if found is not None:
                self.turns[index] += 1
                self.drawn += 1
                return Draw(index, *found, place=found[0] // source.stride[0] + index, passes=source.passes)
            if self.weights is None:
                self.waiting.append(index)
                if len(self.waiting) == len(self.sources):
                    self.waiting, self.turns = [], [0] * len(self.sources)
                    return None

    def _whose_turn(self) -> int:
        """The source that is furthest behind its share; the first of several."""
        weights = self.weights or [1.0] * len(self.sources)
        return min(
            (index for index in range(len(self.sources)) if index not in self.waiting),
            key=lambda index: (self.turns[index] + 1) / weights[index],
        )

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {
            "drawn": self.drawn,
            "turns": list(self.turns),
            "waiting": list(self.waiting),
            "sources": [source.state_dict() for source in self.sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self.drawn, self.turns, self.waiting = int(state["drawn"]), list(state["turns"]), list(state["waiting"])
        for source, position in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(position)
