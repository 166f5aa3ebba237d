"""What the person at the terminal sees of a run: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class ProgressCallback(TrainerCallback):
    """Shows loss, learning rate, gradient norm, tokens per second, MFU, memory and the time left.

    Args:
        console: where to show it; standard error when None.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, width=None if sys.stderr.isatty() else 160)
        self.progress: Progress | None = None
        self.task: Any = None
        self.began = 0.0
        self.first_step = 0
        self.line = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first_step = time.perf_counter(), state.global_step
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            console=self.console,
        )
        self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, line="")
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            left = f"  ETA {self._time_left(state)}"
            self.progress.update(self.task, completed=state.global_step, line=self.line + left)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self.line = describe_step(logs)
            if self.progress is None:
                self._print(f"step {state.global_step}/{state.max_steps}  {self.line}  ETA {self._time_left(state)}")
        elif "eval_loss" in logs:
            self._print(
                f"step {state.global_step}  eval loss {logs['eval_loss']:.4f}  ppl {logs.get('eval_ppl', 0):.2f}"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back. Safe to call twice."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _print(self, text: str) -> None:
        if self.progress is not None:
            self.progress.console.print(text, highlight=False)
        else:
            LOG.info(text)

    def _time_left(self, state: Any) -> str:
        done = state.global_step - self.first_step
        if done <= 0:
            return "?"
        seconds = (time.perf_counter() - self.began) / done * max(state.max_steps - state.global_step, 0)
        return str(timedelta(seconds=round(seconds)))


def describe_step(logs: dict[str, Any]) -> str:
    """The figures of a log line in a few words."""
    parts = [f"loss {logs['loss']:.4f}"]
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.2e}")
    if "grad_norm" in logs:
        parts.append(f"grad {float(logs['grad_norm']):.3f}")
    if "tokens/per_sec_per_gpu" in logs:
        parts.append(f"{logs['tokens/per_sec_per_gpu']:,.0f} tok/s")
    if "mfu" in logs:
        parts.append(f"MFU {100 * logs['mfu']:.1f} %")
    if "memory/max_active (GiB)" in logs:
        parts.append(f"mem {logs['memory/max_active (GiB)']:.1f} GiB")
    return "  ".join(parts)
