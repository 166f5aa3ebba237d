"""`fp16`: counts the steps that the loss scaler leaves out because a scaled gradient overflowed."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

SKIPPED = "fp16/skipped_steps"
SCALE = "fp16/loss_scale"


class LossScaleCallback(TrainerCallback):
    """Adds the scale, and the skipped steps of the whole run, to the log lines.

    A scaler tries a factor twice as large every 2,000 good steps, so that a skipped step now and then is how it works; a
    factor that falls on and on is a model that does not fit into float16.

    Args:
        trainer: an `AxolotlTrainer`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.num_skipped = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counts = [entry[SKIPPED] for entry in state.log_history if SKIPPED in entry]
        self.num_skipped = int(counts[-1]) if counts else 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        accelerator = self.trainer.accelerator
        if accelerator.scaler is None:
            return
        self.num_skipped += bool(accelerator.optimizer_step_was_skipped)
        scale = accelerator.scaler.get_scale()
        self.trainer.store_metrics({SKIPPED: (self.num_skipped, "max"), SCALE: (scale, "min")})
