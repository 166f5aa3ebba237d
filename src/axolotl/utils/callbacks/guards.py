"""Small callbacks that change when something happens: collect garbage, save early, evaluate, give up."""

from __future__ import annotations

import gc
from typing import Any

import torch
import transformers
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class GCCallback(TrainerCallback):
    """Collects Python's garbage and returns cached accelerator memory.

    Args:
        gc_collect_steps: every so many steps; -1 for only before evaluations and at the end of epochs.
    """

    def __init__(self, gc_collect_steps: int | None = -1):
        self.gc_collect_steps = gc_collect_steps or -1
        self.next_after_eval = -1

    def _collect(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._collect()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate:
            # Evaluation needs memory of other sizes, and so does the first step after it.
            self._collect()
            self.next_after_eval = state.global_step + 1
        elif state.global_step == self.next_after_eval or (
            self.gc_collect_steps > 0 and state.global_step % self.gc_collect_steps == 0
        ):
            self._collect()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._collect()


class SaveModelOnFirstStepCallback(TrainerCallback):
    """Saves after the first step, so that a problem with saving shows at once."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == 1:
            control.should_save = True
        return control


class SkipEvalOnResumeCallback(TrainerCallback):
    """Keeps `eval_on_start` from repeating, at the start of a resumed run, an evaluation that was already done."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0 and args.eval_on_start:
            LOG.info(f"Resuming at step {state.global_step}: the evaluation at the start is left out.")
            args.eval_on_start = False


class EarlyStoppingCallback(transformers.EarlyStoppingCallback):
    """That of transformers; a run that it has ended and that is resumed with the same patience ends at once.

    It has the same name because that is how checkpoints find its state.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step and self.early_stopping_patience_counter >= self.early_stopping_patience:
            LOG.warning(
                f"Early stopping had ended the run of this checkpoint: {self.early_stopping_patience_counter} evaluations without "
                f"improvement. Nothing more is trained. A higher `early_stopping_patience` than {self.early_stopping_patience} "
                "goes on."
            )
            control.should_training_stop = True
        return control


class LossWatchDogCallback(TrainerCallback, ExportableState):
    """Stops the run when the loss stays above a threshold. Checkpoints keep its strikes.

    Args:
        threshold: `loss_watchdog_threshold`; a logged loss above it is a strike.
        patience: `loss_watchdog_patience`; strikes in a row that stop the run.
    """

    def __init__(self, threshold: float, patience: int = 3):
        self.threshold = threshold
        self.patience = patience
        self.strikes = 0

    def state(self) -> dict[str, dict[str, Any]]:
        return {
            "args": {"threshold": self.threshold, "patience": self.patience},
            "attributes": {"strikes": self.strikes},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step and self.strikes >= self.patience:
            LOG.warning(
                f"`loss_watchdog_threshold: {self.threshold}` had ended the run of this checkpoint. Nothing more is trained. A "
                f"higher `loss_watchdog_patience` than {self.patience} goes on, and so does an earlier checkpoint."
            )
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> Any:
        loss = (logs or {}).get("loss")
        if loss is None:
            return control
        # Not `loss > threshold`: a loss that is not a number is above every threshold.
        self.strikes = 0 if loss <= self.threshold else self.strikes + 1
        if self.strikes >= self.patience:
            LOG.warning(
                f"The loss was above `loss_watchdog_threshold: {self.threshold}` in {self.strikes} log lines in a row "
                f"(last: {loss:.4f}). Stopping at step {state.global_step}."
            )
            control.should_training_stop = True
        return control
