"""What happens to an optimizer step whose loss or gradient is not finite.

The update is left out: weights, optimizer state and loss averages stay as they were, while rows, steps and learning rate go
on. `non_finite_policy` says how often that may happen before the run ends. The rows of the step are looked up in the dataset
by their tokens, so that they can be named whatever sampler, packing or collator brought them here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from axolotl.exceptions import TrainingStopped
from axolotl.utils.distributed import gather_on_all_ranks
from axolotl.utils.logging import get_logger
from axolotl.utils.samplers.utils import get_dataset_lengths

LOG = get_logger(__name__)

MAX_ROWS = 8  # rows that a message names per rank
MAX_CANDIDATES = 4096  # rows of the same length that are compared with one of the batch
TEXT_LENGTH = 60  # characters shown of a row
ADVICE = (
    "Try a lower `learning_rate`, more `warmup_steps`, `max_grad_norm: 1.0`, or `bf16: true` instead of `fp16: true`. A "
    "broken row shows up at the same step again when you run with the same `seed`."
)


class NonFiniteGuard:
    """Leaves out the update of a bad step, and ends the run when the policy says so.

    All ranks call it at the same moments with the same values, so they decide alike.

    Args:
        trainer: an `AxolotlTrainer`; `non_finite_policy` and `non_finite_patience` of its arguments are the policy.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.num_skipped = 0  # in the whole run; checkpoints hold both numbers
        self.num_in_a_row = 0
        self.skipping = False  # the step under way is left out
        self.reason_to_stop = ""
        self.last_message = ""  # about the last step that was left out; checkpoints hold it too
        self._loss_before: torch.Tensor | None = None
        self._deciding: torch.optim.Optimizer | None = None  # between `leave_out_if` and `end_update`

    def begin_step(self) -> None:
        """At the beginning of an optimizer step."""
        self.skipping = False
        self._loss_before = self.trainer._tr_loss.clone()
        self._let_go()  # of a step that an exception ended

    def leave_out_if(self, bad: torch.Tensor) -> bool:
        """Have the optimizer decide on the device, without the CPU, whether its next `step` changes anything.

        Args:
            bad: bool (), on the device of the weights.

        Returns:
            Whether it can; where it cannot, `check` has to come before the update.
        """
        trainer = self.trainer
        if trainer.is_deepspeed_enabled or trainer.accelerator.scaler is not None:
            return False
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        if not skips_by_itself(optimizer, bad.device):
            return False
        optimizer.found_inf = bad.float()
        self._deciding = optimizer
        return True

    def check(self, *, bad_loss: bool, bad_gradient: bool) -> None:
        """Before the update of a step, or after it where the optimizer leaves it out by itself.

        Args:
            bad_loss: the loss of some micro-batch on some rank is not finite.
            bad_gradient: the gradient norm is not finite.

        Raises:
            TrainingStopped: the policy is `raise`, or the weights are not finite any more.
        """
        if bad_gradient and not bad_loss and self._scale() > 1:
            return  # the scaler of fp16 tries larger and larger factors: it leaves out the step, and takes a smaller one
        if not (bad_loss or bad_gradient):
            self.num_in_a_row = 0
            return
        message = self._describe(bad_loss)
        if self._weights_are_broken():
            raise TrainingStopped(
                f"{message} The weights themselves are not finite, so that nothing was saved; checkpoints in "
                f"{self.trainer.args.output_dir} are from before. {ADVICE}"
            )
        policy = self.trainer.args.non_finite_policy
        if policy == "raise" or self.trainer.is_deepspeed_enabled:
            raise TrainingStopped(
                f"{message} The weights were not updated with it; a checkpoint in {self.trainer.args.output_dir} is from before. "
                f"{ADVICE}"
            )
        self.num_in_a_row += 1
        self.num_skipped += 1
        self.last_message = message
        self._skip()
        LOG.warning(f"{message} The step is left out ({self.num_in_a_row} in a row, {self.num_skipped} in the run).")
        if policy == "stop" and self.num_in_a_row >= self.trainer.args.non_finite_patience:
            self.reason_to_stop = (
                f"{message} It is the last of {self.num_in_a_row} such steps in a row (`loss_watchdog_patience`). "
                f"{self._where_saved(self.trainer.state.global_step + 1)} {ADVICE} `non_finite_policy: skip` goes on however many "
                "there are."
            )

    def check_end(self) -> None:
        """Where a run ends by itself: with the policy `stop` it does not end well while its steps are not finite."""
        if self.num_in_a_row and not self.reason_to_stop and self.trainer.args.non_finite_policy == "stop":
            steps = "such a step" if self.num_in_a_row == 1 else f"{self.num_in_a_row} such steps in a row"
            self.reason_to_stop = (
                f"{self.last_message} The run ends with {steps}. {self._where_saved(self.trainer.state.global_step)} {ADVICE} "
                "`non_finite_policy: skip` takes the weights as they are."
            )

    def _where_saved(self, step: int) -> str:
        return (
            f"The weights were not updated with them and are saved in {self.trainer.args.output_dir}/checkpoint-{step}."
        )

    def end_update(self) -> None:
        """After the place where the optimizer would have stepped."""
        if self.skipping and self._deciding is None:
            self.trainer.accelerator.gradient_state._set_sync_gradients(True)
        self._let_go()

    def _let_go(self) -> None:
        """The optimizer decides nothing any more."""
        if self._deciding is not None:
            del self._deciding.found_inf
            self._deciding = None

    def _skip(self) -> None:
        """Make the optimizer's next `step` do nothing if it has not already, and take this step's loss out of the average."""
        self.skipping = True
        trainer = self.trainer
        trainer._tr_loss.copy_(self._loss_before)
        if self._deciding is None and trainer.accelerator.scaler is None:
            # What accelerate does between the micro-batches of a step. A scaler finds the bad gradients by itself and has
            # to be told of them, to take a smaller factor.
            trainer.accelerator.gradient_state._set_sync_gradients(False)

    def _scale(self) -> float:
        scaler = self.trainer.accelerator.scaler
        return 0.0 if scaler is None or not scaler.is_enabled() else scaler.get_scale()

    def _weights_are_broken(self) -> bool:
        """Whether a trained weight is not finite, on any rank."""
        trained = (weight for weight in self.trainer.model.parameters() if weight.requires_grad)
        broken = any(not torch.isfinite(weight.detach()).all() for weight in trained)
        if self.trainer.args.world_size <= 1:
            return broken
        flag = torch.tensor(float(broken), device=self.trainer.args.device)
        return cast("torch.Tensor", self.trainer.accelerator.reduce(flag, reduction="sum")).item() > 0

    def _describe(self, bad_loss: bool) -> str:
        """What happened where: the ranks' own sentences, joined."""
        trainer = self.trainer
        losses = [float(loss) for loss in trainer.step_losses]
        guilty = [batch for batch, loss in zip(trainer.step_batches, losses, strict=False) if not np.isfinite(loss)]
        rows = describe_rows(
            guilty or ([] if bad_loss else trainer.step_batches), trainer.train_dataset, trainer.processing_class
        )
        of_rank = gather_on_all_ranks((sum(losses), rows))
        bad = [rank for rank, (loss, _) in enumerate(of_rank) if not np.isfinite(loss)]
        step = trainer.state.global_step + 1
        what = (
            f"The loss of step {step} is {of_rank[bad[0]][0]}" if bad else f"The gradient of step {step} is not finite"
        )
        named = "; ".join(
            f"rank {rank}: {rows}" if trainer.args.world_size > 1 else rows
            for rank, (_, rows) in enumerate(of_rank)
            if rows
        )
        return (
            f"{what} (epoch {trainer.state.epoch or 0:.2f}, learning rate {trainer._get_learning_rate():.3g}, gradient norm "
            f"{float(trainer.step_grad_norm):.3g}, rank {', '.join(map(str, bad)) or 'all'})."
            + (f" Its rows: {named}." if named else "")
        )


def skips_by_itself(optimizer: Any, device: torch.device) -> bool:
    """Whether `step` leaves weights and states alone where `optimizer.found_inf` is 1: torch's fused Adam and AdamW do.

    Not where somebody is told of a step or has put another in its place: they would be given gradients that are not finite.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or device.type not in ("cpu", "cuda"):
        return False
    own = vars(optimizer).get("step")  # schedulers of torch count the calls
    if own is not None and not getattr(own, "_wrapped_by_lr_sched", False):
        return False
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    return not any(hooks) and all(
        group["fused"] and all(type(p.data) is torch.Tensor and p.device == device for p in group["params"])
        for group in optimizer.param_groups
    )


def describe_rows(batches: list[Any], dataset: Any, tokenizer: Any) -> str:
    """Name the rows of collated batches.

    Args:
        batches: dicts with `input_ids` (B, T), and `attention_mask` or `position_ids` (B, T) where there are borders.
        dataset: the prepared dataset they come from; anything but an Arrow dataset gives no indices.
        tokenizer: decodes the beginning of a row; may be None.

    Returns:
        `row 17 of the prepared dataset ("Below is an ..."), ...`; empty when the batches have no tokens.
    """
    documents = [ids for batch in batches for ids in documents_of(batch)]
    lengths = get_dataset_lengths(dataset) if isinstance(dataset, Dataset) and documents else None
    said = []
    for ids in documents[:MAX_ROWS]:
        index = None if lengths is None else _find_row(dataset, lengths, ids)
        place = "a row" if index is None else f"row {index} of the prepared dataset"
        source = _source_of(dataset, index)
        text = "" if tokenizer is None else tokenizer.decode(ids[: 4 * TEXT_LENGTH])[:TEXT_LENGTH]
        said.append(f"{place}{source} ({text!r})")
    if len(documents) > MAX_ROWS:
        said.append(f"and {len(documents) - MAX_ROWS} more")
    return ", ".join(said)


def documents_of(batch: Any) -> Iterator[list[int]]:
    """The token ids of each document in a collated batch, without padding."""
    ids_BT, positions_BT, mask_BT = (batch.get(key) for key in ("input_ids", "position_ids", "attention_mask"))
    if ids_BT is None:
        return
    for row, ids in enumerate(ids_BT.tolist()):
        keep = [True] * len(ids) if mask_BT is None or mask_BT.dim() != 2 else (mask_BT[row] != 0).tolist()
        starts = [0]
        if positions_BT is not None and positions_BT.dim() == 2:
            starts = [t for t, position in enumerate(positions_BT[row].tolist()) if position == 0] or [0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            document = [token for token, kept in zip(ids[start:end], keep[start:end], strict=True) if kept]
            labels = batch.get("labels")
            # Padding at the end of a packed row is a document of its own: one token, again and again, without a label.
            is_padding = len(set(document)) == 1 and labels is not None and bool((labels[row, start:end] == -100).all())
            if document and not (is_padding and len(starts) > 1):
                yield document


def _find_row(dataset: Dataset, lengths: np.ndarray, ids: list[int]) -> int | None:
    candidates = np.flatnonzero(lengths == len(ids))[:MAX_CANDIDATES].tolist()
    found = dataset.select_columns("input_ids")[candidates]["input_ids"] if candidates else []
    return next((index for index, row in zip(candidates, found, strict=True) if list(row) == ids), None)


def _source_of(dataset: Any, index: int | None) -> str:
    """Where a row came from, when the prepared dataset has a column that says so."""
    if index is None:
        return ""
    for column in ("dataset", "dataset_name", "source"):
        if column in dataset.column_names:
            return f", {column} {dataset[index][column]}"
    return ""
