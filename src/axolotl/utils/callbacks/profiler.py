"""`profiler_steps`: a profile of a window of steps, written to `output_dir`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class PytorchProfilerCallback(TrainerCallback):
    """Profiles a window of steps: `profiler_trace.json` (for chrome://tracing or Perfetto) and, on a GPU, `snapshot.pickle`.

    Args:
        steps_to_profile: number of steps.
        profiler_steps_start: step after which the window opens.
    """

    def __init__(self, steps_to_profile: int = 5, profiler_steps_start: int = 0):
        self.first = profiler_steps_start
        self.last = profiler_steps_start + steps_to_profile
        self.profiler: profile | None = None
        self.records_memory = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is not None or not self.first <= state.global_step < self.last:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            self.records_memory = record_memory()
        self.profiler = profile(activities=activities, record_shapes=True, with_stack=True)
        self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.last:
            self._write(args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step <= self.first:
            LOG.warning(
                f"Nothing was profiled: the run ended at step {state.global_step}, `profiler_steps_start: {self.first}` lies beyond it."
            )
        self._write(args)

    def _write(self, args: Any) -> None:
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        folder = Path(args.output_dir)
        suffix = f"_{args.process_index}" if args.world_size > 1 else ""
        try:
            profiler.stop()
            trace = folder / f"profiler_trace{suffix}.json"
            profiler.export_chrome_trace(str(trace))
            if not trace.is_file():
                raise OSError(f"{trace} is not there")  # the profiler's own library does not say so
            if self.records_memory:
                torch.cuda.memory._dump_snapshot(str(folder / f"snapshot{suffix}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
        except (OSError, RuntimeError) as error:
            LOG.warning(f"The profile could not be written to {folder}: {error}. The training goes on.")
            return
        LOG.info(f"Wrote the profile of steps {self.first} to {self.last} to {folder}.")


def record_memory() -> bool:
    """Let torch record where memory of the GPU is taken. False where it cannot: C++ stacks are known on x86-64 Linux only."""
    try:
        torch.cuda.memory._record_memory_history(enabled="all", stacks="all")
    except RuntimeError as error:
        LOG.warning(f"No `snapshot.pickle` will be written: {error}")
        return False
    return True
