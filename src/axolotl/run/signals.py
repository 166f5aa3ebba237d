"""Signals end a run after the step under way, with everything saved."""

from __future__ import annotations

import os
import signal
import time
import types
from typing import Any

import torch
from transformers import TrainerCallback

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.processes import SAME_WISH_SECONDS, STOP_SIGNALS

LOG = get_logger(__name__)


def setup_signal_handler(cfg: DictDefault, trainer: Any) -> dict[int, Any]:
    """Set up signal handler for graceful termination.

    The first signal of `STOP_SIGNALS` lets the step end, saves and exits; the next one exits at once. A launcher passes on
    what a terminal or scheduler has already sent to all: what comes within a second of the first is the same wish.

    Returns:
        The handlers that were there before, for `restore_handlers`.
    """
    owner = os.getpid()
    first_at = 0.0

    def handle(number: int, frame: types.FrameType | None) -> None:
        nonlocal first_at
        if os.getpid() != owner:
            return  # a forked worker: the trainer ends it when it is done with it
        if trainer.stop_requested:
            if time.monotonic() - first_at > SAME_WISH_SECONDS:
                os._exit(128 + number)
            return
        first_at = time.monotonic()
        trainer.stop_requested = True
        trainer.stop_signal = number
        name = signal.Signals(number).name
        LOG.warning(f"{name}: finishing the step, then saving to {cfg.output_dir}. Once more to exit without saving.")

    trainer.stop_signal = None
    trainer.stop_requested = False
    if not isinstance(trainer, AxolotlTrainer):
        trainer.add_callback(StopAfterStep(trainer))
    # An ignored signal stays ignored: `nohup` ignores SIGHUP.
    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handle) for number in wanted}


def restore_handlers(handlers: dict[int, Any]) -> None:
    """Put back what `setup_signal_handler` returned."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


class StopAfterStep(TrainerCallback):
    """Ends the run of a trainer that is not ours, as `StepWatch` does that of an `AxolotlTrainer`.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        wish = self.trainer.stop_requested
        if args.world_size > 1:
            flag = torch.tensor(float(wish), device=args.device)
            wish = self.trainer.accelerator.reduce(flag, reduction="sum").item() > 0
        self.trainer.stop_agreed = wish
        control.should_save |= wish
        control.should_training_stop |= wish
        return control


def was_stopped(trainer: Any) -> bool:
    """Whether a signal ended the run."""
    return vars(trainer).get("stop_agreed", False)


def exit_if_signalled(cfg: DictDefault, trainer: Any) -> None:
    """Leave with the exit code of a signal, when one ended the run and everything is saved."""
    if not was_stopped(trainer):
        return
    number = trainer.stop_signal or signal.SIGTERM
    LOG.warning(
        f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; checkpoint and model are saved in "
        f"{cfg.output_dir}. Go on with `auto_resume_from_checkpoints: true`."
    )
    raise SystemExit(128 + number)
