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
        self._flags: torch.Tensor | None = None  # of the step under way, until they are acted on

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Also done by accelerate, but not through every wrapper that it puts around a sampler.
        sampler = self.trainer.train_order
        if sampler is not None:
            sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._flags = None
        self.trainer.nonfinite.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree with the other ranks on what happened to any of them, in one small collective, and act on it.

        Where the optimizer can leave out the update by itself, that is done after it has been launched: the GPU updates the
        weights while the CPU gets to know the flags and goes on to the next step.
        """
        trainer = self.trainer
        loss, norm = sum(trainer.step_losses), trainer.step_grad_norm
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        # Nothing here makes the CPU wait, as an item of a tensor on the GPU does that is set to a number.
        flags = torch.stack(
            [
                is_not_finite(loss, args.device),
                is_not_finite(0.0 if norm is None else norm, args.device),
                torch.full((), float(trainer.stop_requested), device=args.device),
                torch.full((), float(trainer.checkpoint_writer.failed), device=args.device),
            ]
        )
        if args.world_size > 1:
            flags = cast("torch.Tensor", trainer.accelerator.reduce(flags, reduction="sum"))
        numbers = [flags, *trainer.numbers_of_step(), *([norm] if isinstance(norm, torch.Tensor) else [])]
        trainer.host_values.send(*(number for number in numbers if number.device == flags.device))
        trainer.load_next_step()  # while the GPU has work: now or after the update it is waited for
        self._flags = flags
        if not trainer.nonfinite.leave_out_if(flags[:2].any()):
            self._act_on_flags()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            if self._flags is not None:
                self._act_on_flags()
        finally:
            self.trainer.nonfinite.end_update()

    def _act_on_flags(self) -> None:
        trainer, flags = self.trainer, self._flags
        self._flags = None
        trainer.host_values.receive()
        bad_loss, bad_gradient, stop, save_failed = (count > 0 for count in trainer.host_values.of(flags))
        trainer.stop_agreed, self._save_failed = stop, save_failed
        trainer.nonfinite.check(bad_loss=bad_loss, bad_gradient=bad_gradient)

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


def is_not_finite(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """1 where any number of `value` is an infinity or NaN, else 0: float32 (), on `device`."""
    if not isinstance(value, torch.Tensor):
        value = torch.full((), value, device=device)
    return (~torch.isfinite(value.detach()).all()).float().to(device)
