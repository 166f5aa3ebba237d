"""The order of the data: which rows make which batch, in every epoch, on every rank."""

from __future__ import annotations

from functools import partial
from typing import Any

from accelerate.data_loader import DataLoaderAdapter
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler
from transformers import Trainer
from transformers.trainer_utils import has_length, seed_worker

from axolotl.core.trainers.mixins.token_loss import TokenLossMixin
from axolotl.utils.data.bins import BinDataset, CollateEmpty
from axolotl.utils.data.stream import TokenStream
from axolotl.utils.data.stream_loader import StreamLoader
from axolotl.utils.processes import init_worker
from axolotl.utils.samplers.epoch import EpochSampler, EvenBatches, LengthGroupedEpochSampler
from axolotl.utils.samplers.multipack import MultipackBatchSampler
from axolotl.utils.samplers.utils import get_dataset_lengths

OWN_ORDER = ("random", "sequential", "group_by_length")
"""Values of `train_sampling_strategy` that `EpochSampler` and its kin serve; others are left to transformers."""


class PackingMixin(Trainer):
    """Data loaders whose batches follow from seed and epoch alone.

    An epoch is one list of rows or bins. Optimizer step s takes the items from s * G on, G = micro-batch * accumulation *
    ranks, whatever the factors are; the last step of an epoch takes what is left. So a run that is split otherwise, or
    resumed, sees the same.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if dataset is None or not has_length(dataset):
            return None
        if args.train_sampling_strategy not in OWN_ORDER:
            return super()._get_train_sampler(dataset)
        if args.train_sampling_strategy == "group_by_length":
            rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * self._data_ranks
            self.train_order = LengthGroupedEpochSampler(get_dataset_lengths(dataset), rows_per_step, self._data_seed)
            return self.train_order
        in_order = args.curriculum_sampling or args.train_sampling_strategy == "sequential"
        self.train_order = EpochSampler(len(dataset), self._data_seed, shuffle=not in_order)
        return self.train_order

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    @property
    def _data_ranks(self) -> int:
        """Ranks that see different data; those of a tensor- or context-parallel group see the same."""
        return max(1, self.args.world_size // self._group_size)

    @property
    def _group_size(self) -> int:
        return self.get_tp_size() * self.get_cp_size() * self.get_sp_size()

    def get_train_dataloader(self) -> Any:
        dataset: Any = self.train_dataset
        args = self.args
        if isinstance(dataset, TokenStream):
            self.train_stream = self._stream_loader(dataset)
            return self.train_stream
        packed = args.sample_packing and not args.pretraining
        order = None if isinstance(dataset, IterableDataset) else self._get_train_sampler(dataset)
        # A sampler of somebody else may draw from a generator, which accelerate knows how to share among ranks.
        ours = packed or isinstance(order, EpochSampler)
        if order is None or not ours or self._leaves_batches_to_accelerate():
            return super().get_train_dataloader()
        if packed:
            batches = self._packing_sampler(
                dataset, order, self._train_batch_size, args.max_seq_length, drop_last=args.dataloader_drop_last
            )
        else:
            batches = BatchSampler(order, self._train_batch_size, args.dataloader_drop_last)
        self.train_loader = self._build_dataloader(dataset, batches, self.data_collator, "Training", is_training=True)
        return self.train_loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        args = self.args
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            assert self.eval_dataset is not None
            dataset = self.eval_dataset[dataset]
        # Metrics other than the loss gather the outputs of all ranks, which accelerate's repeated rows keep even.
        gathers = self.compute_metrics is not None and self._data_ranks > 1
        if dataset is None or not has_length(dataset) or gathers or self._leaves_batches_to_accelerate():
            return super().get_eval_dataloader(eval_dataset)
        order = EpochSampler(len(dataset), shuffle=False)
        if args.sample_packing if args.eval_sample_packing is None else args.eval_sample_packing:
            capacity = args.eval_max_seq_length or args.max_seq_length
            batches = self._packing_sampler(dataset, order, args.per_device_eval_batch_size, capacity)
        else:
            batches = BatchSampler(order, args.eval_batch_size, drop_last=False)
        if id(dataset) in self.eval_loaders:
            return self.eval_loaders[id(dataset)]
        collator = self.eval_data_collator or self.data_collator
        loader = self._build_dataloader(dataset, batches, collator, "Evaluation")
        if args.dataloader_persistent_workers:
            self.eval_loaders[id(dataset)] = loader
        return loader

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The loaders that transformers builds, with workers that leave signals to this process."""
        loader = super()._get_dataloader(*args, **kwargs)
        # What accelerate puts around a loader starts the workers of the one within.
        plain: Any = loader.base_dataloader if isinstance(loader, DataLoaderAdapter) else loader
        plain.worker_init_fn = partial(init_worker, then=plain.worker_init_fn)
        return loader

    def _leaves_batches_to_accelerate(self) -> bool:
        """Whether `accelerator_config` asks for batches that are split or handed out by the first rank."""
        config = self.accelerator.dataloader_config
        return bool(config.split_batches or config.dispatch_batches)

    def _stream_loader(self, dataset: TokenStream) -> StreamLoader:
        """This rank's share of a stream."""
        args = self.args
        return StreamLoader(
            dataset,
            self.data_collator,
            rank=args.process_index // self._group_size,
            world_size=self._data_ranks,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _packing_sampler(
        self, dataset: Dataset, order: Sampler, batch_size: int, capacity: int, *, drop_last: bool = False
    ) -> MultipackBatchSampler:
        """Batches of `batch_size` bins of `capacity` tokens, laid out in one row unless real batches are asked for."""
        args = self.args
        return MultipackBatchSampler(
            order,
            batch_size=batch_size,
            batch_max_len=capacity,
            lengths=get_dataset_lengths(dataset),
            packing_efficiency_estimate=args.sample_packing_efficiency,
            drop_last=drop_last,
            sequential=bool(args.sample_packing_sequentially),
            group_size=args.sample_packing_group_size,
            bin_size=args.sample_packing_bin_size,
            num_processes=args.dataset_num_proc,
            mp_start_method=args.sample_packing_mp_start_method,
            one_row=not args.multipack_real_batches,
        )

    def _build_dataloader(
        self, dataset: Any, batches: Any, collator: Any, description: str, *, is_training: bool = False
    ) -> DataLoader:
        """A loader of this rank's share of `batches`."""
        args = self.args
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description=description)
        else:
            collator = self._get_collator_with_removed_columns(collator, description=description)
        # Only the loss of `TokenLossMixin` is surely a sum over tokens, to which an empty batch adds nothing.
        own_loss = self.owns_loss and type(self).compute_loss is TokenLossMixin.compute_loss
        even = EvenBatches(
            batches, self._data_ranks, drop_last=is_training and args.dataloader_drop_last, repeat=not own_loss
        )
        seed = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
        loader = DataLoader(
            BinDataset(dataset),
            batch_sampler=even,
            collate_fn=CollateEmpty(collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(init_worker, then=seed if is_training else None),
        )
        return self.accelerator.prepare_data_loader(loader)
