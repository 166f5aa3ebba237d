"""The order of the data: which rows make which batch, in every epoch, on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler
from transformers import Trainer
from transformers.trainer_utils import has_length, seed_worker

from axolotl.utils.data.bins import BinDataset
from axolotl.utils.data.stream import TokenStream
from axolotl.utils.data.stream_loader import StreamLoader
from axolotl.utils.samplers.epoch import EpochSampler
from axolotl.utils.samplers.multipack import MultipackBatchSampler
from axolotl.utils.samplers.utils import get_dataset_lengths


class LengthGroupedEpochSampler(EpochSampler):
    """Rows of similar length next to each other, in an order that depends on nothing but `(seed, epoch)`.

    The shuffled rows are cut into groups of 50 batches and sorted by length within a group, longest first; the longest row
    of all comes first, so that an out-of-memory error shows at once.

    Args:
        lengths: tokens of every row.
        batch_size: rows per optimizer step and rank.
        seed: any non-negative integer.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0):
        super().__init__(len(lengths), seed)
        self.lengths = lengths
        self.batch_size = batch_size

    def order(self) -> np.ndarray:
        order = super().order()
        group = 50 * self.batch_size
        groups = [order[start : start + group] for start in range(0, len(order), group)]
        grouped = np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in groups])
        longest = int(np.argmax(self.lengths[grouped]))
        grouped[[0, longest]] = grouped[[longest, 0]]
        return grouped


class PackingMixin(Trainer):
    """Packed and unpacked data loaders whose order follows from seed and epoch, so that a resumed run sees the same."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if dataset is None or not has_length(dataset):
            return None
        if args.train_sampling_strategy == "group_by_length":
            lengths = get_dataset_lengths(dataset)
            rows_per_step = args.train_batch_size * args.gradient_accumulation_steps
            self.train_order = LengthGroupedEpochSampler(lengths, rows_per_step, self._data_seed)
            return self.train_order
        if args.train_sampling_strategy not in ("random", "sequential"):
            return super()._get_train_sampler(dataset)
        in_order = args.curriculum_sampling or args.train_sampling_strategy == "sequential"
        self.train_order = EpochSampler(len(dataset), self._data_seed, shuffle=not in_order)
        return self.train_order

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_train_dataloader(self) -> Any:
        dataset = self.train_dataset
        if isinstance(dataset, TokenStream):
            self.train_stream = self._stream_loader(dataset)
            return self.train_stream
        if not self.args.sample_packing or self.args.pretraining or isinstance(dataset, IterableDataset):
            return super().get_train_dataloader()
        sampler = self._packing_sampler(
            dataset,
            self._get_train_sampler(dataset),
            batch_size=self._train_batch_size,
            max_len=self.args.max_seq_length,
            drop_last=self.args.dataloader_drop_last,
        )
        return self._packed_dataloader(dataset, sampler, "Training", is_training=True)

    def _stream_loader(self, dataset: TokenStream) -> StreamLoader:
        """This rank's share of a stream. Ranks of a tensor- or context-parallel group read the same."""
        args = self.args
        group = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        return StreamLoader(
            dataset,
            self.data_collator,
            rank=args.process_index // group,
            world_size=max(1, args.world_size // group),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            assert self.eval_dataset is not None
            dataset = self.eval_dataset[dataset]
        packed = self.args.sample_packing if self.args.eval_sample_packing is None else self.args.eval_sample_packing
        if not packed or dataset is None or isinstance(dataset, IterableDataset):
            with self._uneven_batches():
                return super().get_eval_dataloader(eval_dataset)
        sampler = self._packing_sampler(
            dataset,
            EpochSampler(len(dataset), shuffle=False),
            batch_size=self.args.per_device_eval_batch_size,
            max_len=self.args.eval_max_seq_length or self.args.max_seq_length,
            drop_last=False,
        )
        return self._packed_dataloader(dataset, sampler, "Evaluation")

    @contextlib.contextmanager
    def _uneven_batches(self) -> Iterator[None]:
        """Lets ranks have different numbers of evaluation batches, so that no row is evaluated twice.

        The evaluation of the loss has no collective per batch. A sharded model has them in its forward; there accelerate
        repeats rows until all ranks have as many.
        """
        config = self.accelerator.dataloader_config
        before = config.even_batches
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled) and self.compute_metrics is None:
            config.even_batches = False
        try:
            yield
        finally:
            config.even_batches = before

    def _packing_sampler(
        self, dataset: Dataset, order: Sampler, *, batch_size: int, max_len: int, drop_last: bool
    ) -> MultipackBatchSampler:
        """Bins of `max_len` tokens, `batch_size` in a batch; one bin of that many tokens unless real batches are asked."""
        args = self.args
        if not args.multipack_real_batches:
            batch_size, max_len = 1, batch_size * max_len
        return MultipackBatchSampler(
            order,
            batch_size=batch_size,
            batch_max_len=max_len,
            lengths=get_dataset_lengths(dataset),
            packing_efficiency_estimate=args.sample_packing_efficiency,
            drop_last=drop_last,
            sequential=bool(args.sample_packing_sequentially),
            group_size=args.sample_packing_group_size,
            bin_size=args.sample_packing_bin_size,
            num_processes=args.dataset_num_proc,
            mp_start_method=args.sample_packing_mp_start_method,
            batch_multiple=max(1, args.world_size),
        )

    def _packed_dataloader(
        self, dataset: Dataset, sampler: BatchSampler, description: str, *, is_training: bool = False
    ) -> DataLoader:
        args = self.args
        loader = DataLoader(
            BinDataset(self._remove_unused_columns(dataset, description=description)),
            batch_sampler=sampler,
            collate_fn=self.data_collator if is_training else (self.eval_data_collator or self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
            if is_training
            else None,
        )
        return self.accelerator.prepare_data_loader(loader)
