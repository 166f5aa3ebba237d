"""`auto_find_batch_size`: the largest micro-batch that fits, found by trying the longest rows before training begins.

The rows of an optimizer step stay the same, and so does its loss: a smaller micro-batch means more accumulation steps. What a
trial leaves behind is nothing: no gradient, no random number, no change of a weight.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from axolotl.core.trainers.utils import kept_modes, kept_random_state
from axolotl.utils.data.bins import BinDataset
from axolotl.utils.dict import DictDefault
from axolotl.utils.distributed import gather_on_all_ranks
from axolotl.utils.forecast import FRAGMENTATION
from axolotl.utils.forecast_states import state_bytes
from axolotl.utils.optimizers.states import read_state_options, trained_weights
from axolotl.utils.optimizers.table import read_any_name
from axolotl.utils.samplers.utils import get_dataset_lengths


def possible_sizes(rows_per_step: int) -> list[int]:
    """Micro-batch sizes that make up a step of that many rows per rank, rising."""
    return [size for size in range(1, rows_per_step + 1) if rows_per_step % size == 0]


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of rising sizes that fits, found by bisection; None when not even the smallest does."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else None


def fits_in_memory(trainer: Any, cfg: DictDefault) -> bool:
    """Whether a step with the trainer's present batch size fits on every rank.

    Two forward and backward passes over the longest rows, the second one beside the gradients of the first, with memory set
    aside for what comes later: the state of the optimizer, the buckets of data parallelism and some fragmentation.

    Args:
        trainer: a trainer that has not begun to train.
        cfg: the config, for the size of the optimizer's state.
    """
    fits = _passes_fit(trainer, cfg)
    # The traceback of an error, which holds the activations, is gone here.
    trainer.model.zero_grad(set_to_none=True)
    gc.collect()
    if trainer.args.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return all(gather_on_all_ranks(fits))


def _passes_fit(trainer: Any, cfg: DictDefault) -> bool:
    """Whether the two passes of `fits_in_memory` run on this rank."""
    model, device = trainer.model, trainer.args.device
    try:
        reserve = torch.empty(reserved_bytes(trainer, cfg), dtype=torch.uint8, device=device)
        _enable_checkpointing(trainer)
        with kept_modes(model), kept_random_state():
            model.train()
            inputs = trainer._prepare_inputs(longest_batch(trainer))
            for _ in range(2):
                with trainer.accelerator.autocast(), trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(model, inputs)
                loss.backward()
        del reserve
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    return True


def reserved_bytes(trainer: Any, cfg: DictDefault) -> int:
    """Memory that training needs besides weights, gradients and activations, in bytes."""
    trained = trained_weights(cfg, trainer.model)
    size = state_bytes(read_any_name(cfg), trained, read_state_options(cfg))
    if trainer.args.world_size > 1:
        size += sum(weight.count * weight.numel * weight.item for weight in trained)
    if trainer.args.device.type == "cuda":
        size += FRAGMENTATION * torch.cuda.get_device_properties(trainer.args.device).total_memory
    return int(size)


def longest_batch(trainer: Any) -> Any:
    """A batch of the longest rows; of packed rows, which are all about full, the first one."""
    args, dataset = trainer.args, trainer.train_dataset
    if args.sample_packing:
        return next(iter(trainer.get_train_dataloader()))
    lengths = get_dataset_lengths(dataset)
    longest = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)[: args.train_batch_size]
    rows = BinDataset(trainer._remove_unused_columns(dataset, description="Training"))
    return trainer.data_collator(rows.__getitems__([longest[i % len(longest)] for i in range(args.train_batch_size)]))


def _enable_checkpointing(trainer: Any) -> None:
    """What `Trainer.train` does before its first step."""
    args, model = trainer.args, trainer.model
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if getattr(args, f"{prefix}_checkpointing"):
        kwargs = {f"{prefix}_checkpointing_kwargs": getattr(args, f"{prefix}_checkpointing_kwargs")}
        getattr(model, f"{prefix}_checkpointing_enable")(**kwargs)
