"""What the trainer looks after at the edges of a step: order of the epoch, finite loss, counters, a wish to stop."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from axolotl.exceptions import TrainingStopped


class StepWatch(TrainerCallback):
    """Added by `AxolotlTrainer` to itself.

    Args:
        trainer: the trainer that is watched.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._save_failed = False
        self._first_step = True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Also done by accelerate, but not through every wrapper that it puts around a sampler.
        sampler = self.trainer.train_order
        if sampler is not None:
            sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.nonfinite.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree with the other ranks on what happened to any of them, in one small collective, and act on it."""
        trainer = self.trainer
        loss, norm = sum(trainer.step_losses), trainer.step_grad_norm
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        flags = torch.zeros(4, dtype=torch.float32, device=args.device)
        flags[0] = ~torch.isfinite(torch.as_tensor(loss, device=args.device)).all()
        flags[1] = ~torch.isfinite(torch.as_tensor(0.0 if norm is None else norm, device=args.device)).all()
        flags[2] = float(trainer.stop_requested)
        flags[3] = float(trainer.checkpoint_writer.failed)
        if args.world_size > 1:
            flags = cast("torch.Tensor", trainer.accelerator.reduce(flags, reduction="sum"))
        trainer.load_next_step()  # while the GPU has work: now it is waited for
        numbers = [flags, *trainer.numbers_of_step(), *([norm] if isinstance(norm, torch.Tensor) else [])]
        trainer.host_values.read(*(number for number in numbers if number.device == flags.device))
        bad_loss, bad_gradient, stop, save_failed = (count > 0 for count in trainer.host_values.of(flags))
        trainer.stop_agreed, self._save_failed = stop, save_failed
        trainer.nonfinite.check(bad_loss=bad_loss, bad_gradient=bad_gradient)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.nonfinite.end_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        trainer = self.trainer
        trainer.take_step_counts(with_loss=not trainer.nonfinite.skipping)
        if trainer.train_stream is not None:
            # transformers counts epochs of a stream from where it resumed.
            state.epoch = state.global_step / state.max_steps
        if args.world_size <= 1 and trainer.stop_requested:
            trainer.stop_agreed = True  # nobody else has to agree: a signal during this very step counts
        if trainer.stop_agreed or trainer.nonfinite.reason_to_stop:
            control.should_save = True
            control.should_training_stop = True
        if self._save_failed:
            control.should_save = True
        if self._first_step:
            self._first_step = False
            trainer.reserve_host_memory()
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        guard = self.trainer.nonfinite
        if self.trainer.stop_agreed:
            control.should_evaluate = False
        elif control.should_training_stop and not guard.reason_to_stop:
            # Whatever ended the run: the last step, early stopping, a callback.
            guard.check_end()
            control.should_save |= bool(guard.reason_to_stop)
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        guard = self.trainer.nonfinite
        if not self.trainer.stop_agreed:
            guard.check_end()  # of a run that had ended so before, and was resumed
        if guard.reason_to_stop:
            raise TrainingStopped(guard.reason_to_stop)
