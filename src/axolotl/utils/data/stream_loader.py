"""The data loader of a stream: worker processes, this rank's share, and a position that goes into checkpoints.

A worker sends the position after each batch along with it, so the loader knows at any moment which batches were taken, and
not merely which were loaded ahead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from axolotl.exceptions import AxolotlError, CheckpointError
from axolotl.utils.data.stream import Batch, TokenStream
from axolotl.utils.logging import get_logger
from axolotl.utils.processes import init_worker

LOG = get_logger(__name__)

Position = Mapping[str, Any]
Item = tuple[Batch | AxolotlError, dict[str, Any], int]


class _Share(IterableDataset):
    """What the workers of one rank read. Worker `w` plays part `(w + first) % num_parts` of the rank."""

    def __init__(self, stream: TokenStream, rank: int, world_size: int, first: int, positions: list[Position | None]):
        self.stream = stream
        self.rank = rank
        self.world_size = world_size
        self.first = first
        self.positions = positions

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        part = ((worker.id if worker else 0) + self.first) % len(self.positions)
        reader = self.rank + self.world_size * part
        readers = self.world_size * len(self.positions)
        try:
            for batch, position in self.stream.read(reader, readers, self.positions[part]):
                yield batch, position, part
        except AxolotlError as error:
            # torch would put the traceback of the worker into the message; the loader raises it as it is.
            yield error, {}, part


class _Collate:
    def __init__(self, collate: Callable[[Batch], dict[str, Any]]):
        self.collate = collate

    def __call__(self, item: Item) -> tuple[dict[str, Any] | AxolotlError, dict[str, Any], int]:
        batch, position, part = item
        return batch if isinstance(batch, AxolotlError) else self.collate(batch), position, part


class StreamLoader:
    """Collated batches of this rank, without end.

    Args:
        stream: the stream, the same on every rank.
        collate: makes tensors of a batch of rows or bins.
        rank: of the data-parallel ranks.
        world_size: number of data-parallel ranks.
        num_workers: processes that read, tokenize and collate; 0 for this one.
        options: more arguments of `DataLoader`.
    """

    def __init__(
        self,
        stream: TokenStream,
        collate: Callable[[Batch], dict[str, Any]],
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        **options: Any,
    ):
        self.dataset = stream
        self.collate = collate
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.options = options
        self.positions: list[Position | None] = [None] * max(1, num_workers)
        self.next_part = 0
        self._reported = 0
        self._passes = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        share = _Share(self.dataset, self.rank, self.world_size, self.next_part, list(self.positions))
        loader = DataLoader(
            share,
            batch_size=None,
            collate_fn=_Collate(self.collate),
            num_workers=self.num_workers,
            worker_init_fn=init_worker,
            # Without a generator of its own, torch would draw from that of the run, which a resumed run has just restored.
            generator=torch.Generator().manual_seed(self.dataset.plan.seed),
            **self.options,
        )
        for batch, position, part in loader:
            if isinstance(batch, AxolotlError):
                raise batch
            self.positions[part] = position
            self.next_part = (part + 1) % len(self.positions)
            self._report()
            yield batch

    def _report(self) -> None:
        """Say what was dropped, when it is new and each time it has doubled; and when a dataset starts over."""
        known = [position for position in self.positions if position]
        totals: dict[tuple[str, str], int] = {}
        for position in known:
            for name, reasons in position["dropped_now"].items():
                for reason, count in reasons.items():
                    totals[name, reason] = totals.get((name, reason), 0) + count
        total = sum(totals.values())
        if total and total >= 2 * self._reported:
            self._reported = total
            for (name, reason), count in totals.items():
                LOG.warning(f"dataset {name}: {count:,} rows so far: {reason}")
        passes = max(source["pass"] for position in known for source in position["mix"]["sources"])
        if passes > self._passes:
            self._passes = passes
            LOG.info(f"the stream starts over: a dataset was read to its end {passes} times")

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was taken, as JSON values."""
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "sources": self.dataset.source_names,
            "layout": self.dataset.layout,
            "next_part": self.next_part,
            "positions": list(self.positions),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batches that were taken when `state` was made.

        Raises:
            CheckpointError: the state is of another number of datasets.
        """
        self._check_sources(state)
        self.positions, self.next_part = list(state["positions"]), int(state["next_part"])
        if state["layout"] != self.dataset.layout:
            LOG.warning(
                "the keys that lay out batches (`sequence_len`, `micro_batch_size`, packing, buffer, `seed`, ...) are not those "
                f"of the checkpoint: {state['layout']} before, {self.dataset.layout} now. The stream goes on where the rows "
                "that were being trained on began, so some come again. None is left out."
            )
            self.positions = [position and {**position, "batch": 0} for position in self.positions]

    def _check_sources(self, state: Mapping[str, Any]) -> None:
        before, now = state["sources"], self.dataset.source_names
        if len(before) != len(now):
            raise CheckpointError(
                f"the checkpoint is in the middle of the streamed datasets {', '.join(before)}, but the config names "
                f"{', '.join(now)}. Resume with the same datasets, or start a new run from the saved weights (`base_model` or "
                "`lora_model_dir`)."
            )
        for old, new in zip(before, now, strict=True):
            if old != new:
                LOG.warning(f"the checkpoint was made with dataset {old}; its position is taken over for {new}")

    def save(self, folder: str | Path) -> None:
        """Write this rank's position into a checkpoint."""
        (Path(folder) / state_file(self.rank)).write_text(json.dumps(self.state_dict()), encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Go on where a checkpoint stopped.

        With another number of ranks or workers the rows cannot be dealt out as they were. Then everyone goes on from the
        earliest position, and says how many rows may come twice; none is left out.
        """
        files = sorted(Path(folder).glob(state_file("*")))
        if not files:
            LOG.warning(f"{folder} has no position in the streamed data: the data starts from its beginning.")
            return
        states = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        parts = len(self.positions)
        saved = [(state["world_size"], len(state["positions"])) for state in states]
        if saved == [(self.world_size, parts)] * self.world_size:
            own = next(state for state in states if state["rank"] == self.rank)
            self.load_state_dict(own)
            return
        self._check_sources(states[0])
        positions = [position or self.dataset.start() for state in states for position in state["positions"]]
        earliest = min(positions, key=lambda position: position["mix"]["drawn"])
        repeated = max(position["mix"]["drawn"] for position in positions) - earliest["mix"]["drawn"]
        LOG.warning(
            f"{folder} was saved with {saved[0][0]} ranks and {saved[0][1]} loader processes each, this run has "
            f"{self.world_size} and {parts}. The stream goes on at row {earliest['mix']['drawn']:,}; up to "
            f"{repeated + self.dataset.plan.num_rows * len(positions):,} rows may come again. None is left out."
        )
        self.positions = [{**earliest, "batch": 0} for _ in range(parts)]
        self.next_part = 0


def state_file(rank: int | str) -> str:
    """Name of the file with the position of a rank."""
    return f"stream_state_{rank}.json"
