"""The micro-batches of an optimizer step: loaded, counted and sent to the device while the GPU still computes the step before."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import recursively_apply, send_to_device
from datasets import Dataset
from transformers import Trainer

from axolotl.core.trainers.causal_loss import (
    count_supervised_tokens,
    count_tokens,
    mask_document_starts,
    shift_labels,
)
from axolotl.kernels.cross_entropy import find_kept_rows
from axolotl.monkeypatch.attention.layouts import Identity, Key, Layout, identity, key_of, read_batch
from axolotl.utils.data.bins import BinDataset, CollateEmpty, EmptyBatch

OWN_COLLATORS = "axolotl.utils.collators."
"""Where the collators are that draw no random numbers."""


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of an optimizer step, and what would make the CPU wait if the GPU were asked for it.

    Attributes:
        loaded: as the loader gave them.
        batches: on the device, the first tokens of packed documents masked.
        counts: int64 (2,): supervised tokens and all tokens of the step on this rank.
        counts_there: the same on the device.
        has_labels: whether there are labels to count.
        kept_rows: rows with a label, by the tensor of labels.
        full_masks: attention masks that mask nothing.
        layouts: documents and padding of the batches, for their positions and masks.
    """

    loaded: list[Any]
    batches: list[Any]
    counts: torch.Tensor
    counts_there: torch.Tensor
    has_labels: bool
    kept_rows: dict[Identity, torch.Tensor]
    full_masks: set[Identity]
    layouts: dict[Key, Layout]


class StepBatchesMixin(Trainer):
    """Gets the micro-batches of the next step ready before the CPU waits for the GPU to finish this one.

    That is done where it cannot be noticed: within an epoch, and with a loader that draws no random numbers in this process,
    because a checkpoint that is saved in between holds the generators as they are.
    """

    owns_loss: bool  # this and the next two: see `TokenLossMixin`
    _is_of_transformers: bool
    _pad_token_id: int | None
    train_order: Any  # this and the next: see `PackingMixin`
    train_loader: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Of the optimizer step under way: its micro-batches and their losses on this rank, for the report of a bad one.
        self.step_batches: list[Any] = []
        self.step_losses: list[torch.Tensor] = []
        self.step_loss = torch.zeros((), device=self.args.device)
        self._step_began = time.perf_counter()
        self._step_sums = torch.zeros(2, dtype=torch.int64)
        self._kept_rows: dict[Identity, torch.Tensor] = {}
        self._full_masks: set[Identity] = set()
        self._layouts: dict[Key, Layout] = {}
        # Of the next step: where it is loaded from, how many micro-batches are left there, and what has been loaded.
        self._ahead: HostLoader | None = None  # None where steps are not loaded ahead
        self._epoch_iterator: Iterator[Any] | None = None
        self._batches_left = 0
        self._next_step: StepBatches | Exception | None = None
        self._left_over: list[Any] = []  # loaded for a step that then took fewer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The micro-batches of an optimizer step and the number of supervised tokens in them, over all ranks."""
        self.step_losses = []
        if not self.owns_loss:
            self.step_batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
            return self.step_batches, num_items
        self._step_began = time.perf_counter()
        step, self._next_step = self._next_step, None
        if isinstance(step, StepBatches) and len(step.loaded) != num_batches:
            # A callback has changed the accumulation since.
            self._left_over, step = [*step.loaded, *self._left_over], None
        if step is None:
            step = self._load_step(epoch_iterator, num_batches, device)
        if isinstance(step, Exception):
            raise step
        self._epoch_iterator = epoch_iterator
        self._batches_left -= num_batches
        self.step_batches = step.batches
        self._kept_rows, self._full_masks, self._layouts = step.kept_rows, step.full_masks, step.layouts
        self.step_loss = torch.zeros((), device=device)
        return step.batches, self._count_over_ranks(step)

    def load_next_step(self) -> None:
        """Load the micro-batches of the next step, if there is one in this epoch. An error is kept until it begins."""
        num_batches = min(self.args.gradient_accumulation_steps, self._batches_left)
        is_last = self.state.global_step + 1 >= self.state.max_steps
        if self._ahead is None or self._epoch_iterator is None or num_batches <= 0 or is_last:
            return
        if self._next_step is not None:
            return  # micro-batches that were taken together end two steps: a callback has changed the accumulation
        try:
            self._next_step = self._load_step(self._epoch_iterator, num_batches, self.args.device)
        except Exception as error:  # noqa: BLE001 - raised when the batches are asked for
            self._next_step = error

    @contextmanager
    def loading_ahead(self, loader: Any, num_batches: int) -> Iterator[None]:
        """For the time of an epoch.

        Args:
            loader: of the epoch, as it is given to the training loop.
            num_batches: micro-batches that are left in the epoch.
        """
        self._ahead = HostLoader(loader) if self._may_load_ahead(loader) else None
        self._batches_left = num_batches
        try:
            yield
        finally:
            if self._ahead is not None:
                self._ahead.restore()
            self._ahead = self._next_step = self._epoch_iterator = None
            self._left_over = []

    def _may_load_ahead(self, loader: Any) -> bool:
        """Whether it makes no difference when a batch is loaded."""
        if not (self.owns_loss and isinstance(loader, DataLoaderShard) and loader is self.train_loader):
            return False
        if type(self).get_batch_samples is not StepBatchesMixin.get_batch_samples:
            return False
        if not type(self.train_order).__module__.startswith("axolotl."):
            return False
        return loader.num_workers > 0 or draws_nothing(loader)

    def _load_step(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> StepBatches:
        with nullcontext() if self._ahead is None else self._ahead.batches_on_host():
            loaded = list(itertools.islice(itertools.chain(self._left_over, epoch_iterator), num_batches))
        self._left_over = self._left_over[num_batches:]
        batches = [mask_document_starts(batch) for batch in loaded]
        counted = [
            count_both(batch, self._pad_token_id)
            for batch, source in zip(batches, loaded, strict=True)
            if "labels" in batch and not isinstance(source, EmptyBatch)
        ]
        counts = torch.stack(counted).sum(0) if counted else torch.zeros(2, dtype=torch.int64)
        kept = [find_kept_rows(shift_labels(batch)) if "labels" in batch else None for batch in batches]
        full = self._find_full_masks(batches)
        has_labels = bool(batches) and "labels" in batches[0]
        layouts = [read_batch(batch) for batch in batches]
        parts = [layout and (layout.starts, layout.borders) for layout in layouts]
        batches, kept, counts_there, parts = self._send([batches, kept, counts, parts], device)
        return StepBatches(
            loaded,
            batches,
            counts,
            counts_there,
            has_labels,
            {identity(batch["labels"]): rows for batch, rows in zip(batches, kept, strict=True) if rows is not None},
            {identity(batch["attention_mask"]) for batch, is_full in zip(batches, full, strict=True) if is_full},
            {
                key_of(batch.get("position_ids"), batch.get("attention_mask")): replace(
                    layout, starts=part[0], borders=part[1]
                )
                for batch, layout, part in zip(batches, layouts, parts, strict=True)
                if layout is not None
            },
        )

    def _count_over_ranks(self, step: StepBatches) -> torch.Tensor | None:
        """Supervised tokens of the step over all ranks, at least 1, on the device; None where there are no labels.

        Not done ahead: a rank whose next batches cannot be loaded would go on with the step under way, and then wait for the
        others in another collective than this one, where they wait for it.
        """
        self._step_sums, sums_there = step.counts, step.counts_there
        if not step.has_labels:
            return None
        if self.args.world_size > 1:
            # [supervised, all]: one small collective per optimizer step.
            sums_there = cast("torch.Tensor", self.accelerator.reduce(sums_there, reduction="sum"))
            # Ranks of a tensor- or context-parallel group hold the same batch.
            sums_there //= self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
            self._step_sums = sums_there
        return sums_there[0].clamp(min=1)

    def _find_full_masks(self, batches: list[Any]) -> list[bool]:
        """Which batches have rows without padding, whose mask models of transformers need not be given; others may read it."""
        masks = [
            None if batch.get("position_ids") is not None else batch.get("attention_mask")
            for batch in (batches if self._is_of_transformers else [{}] * len(batches))
        ]
        return [isinstance(mask, torch.Tensor) and bool((mask != 0).all()) for mask in masks]

    def _send(self, values: Any, device: torch.device) -> Any:
        """Tensors on the device. Pinned memory is copied without a wait for what the GPU has to do before."""
        if device.type == "cuda" and self.args.dataloader_pin_memory:
            values = recursively_apply(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory(), values)
        return send_to_device(values, device, non_blocking=True)


class HostLoader:
    """A loader that leaves its batches in host memory while they are taken with `batches_on_host`.

    accelerate would send them to the device and wait for the GPU with each tensor. Whoever else reads the loader gets batches
    on the device. Until the first batch is taken it is left without a device, because a resumed epoch begins with a copy of it.
    """

    def __init__(self, loader: DataLoaderShard):
        self.loader = loader
        self.device = loader.device
        loader.device = None

    @contextmanager
    def batches_on_host(self) -> Iterator[None]:
        self.loader.device = None
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        self.loader.device = self.device


def count_both(batch: Any, pad_token_id: int | None) -> torch.Tensor:
    """Supervised tokens and all tokens of a batch: int64 (2,)."""
    supervised = count_supervised_tokens(batch)
    return torch.stack([supervised, count_tokens(batch, pad_token_id).to(supervised.device)])


def draws_nothing(loader: Any) -> bool:
    """Whether rows and batches are made by code of this package and of `datasets`, which draws no random numbers."""
    dataset, collate = loader.dataset, loader.collate_fn
    if not (isinstance(dataset, BinDataset) and isinstance(collate, CollateEmpty)):
        return False
    rows = dataset.dataset
    plain = type(rows) is Dataset and rows.format["type"] != "custom"
    return plain and type(collate.collate).__module__.startswith(OWN_COLLATORS)
