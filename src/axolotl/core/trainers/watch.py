"""What the trainer looks after at the edges of a step: order of the epoch, finite loss, counters, a wish to stop."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from axolotl.exceptions import TrainingStopped


class StepWatch(TrainerCallback):
    """Added by `AxolotlTrainer` to itself.

    Args:
        trainer: the trainer that is watched.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Also done by accelerate, but not through every wrapper that it puts around a sampler.
        sampler = self.trainer.train_order
        if sampler is not None:
            sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = self.trainer.step_loss
        if self.trainer.owns_loss and not torch.isfinite(loss):
            raise TrainingStopped(
                f"The loss of step {state.global_step + 1} is {loss.item()} (epoch {state.epoch or 0:.2f}, learning rate "
                f"{self.trainer._get_learning_rate():.3g}, rank {args.process_index}). The weights were not updated with "
                f"it; a checkpoint in {args.output_dir} is from before. Try a lower `learning_rate`, more "
                "`warmup_steps`, `max_grad_norm: 1.0`, or `bf16: true` instead of `fp16: true`; a broken row in the data "
                "shows up at the same step again when you run with the same `seed`."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.trainer.take_step_counts()
        if self.trainer.train_stream is not None:
            # transformers counts epochs of a stream from where it resumed.
            state.epoch = state.global_step / state.max_steps
        if self.trainer.stop_agreed or (args.world_size <= 1 and self.trainer.stop_requested):
            self.trainer.stop_agreed = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.trainer.stop_agreed:
            control.should_evaluate = False
        return control
