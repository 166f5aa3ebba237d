"""HF Trainer callback for creating pytorch profiling snapshots."""

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

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is not None or not self.first <= state.global_step < self.last:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(enabled="all", stacks="all")
        self.profiler = profile(activities=activities, record_shapes=True, with_stack=True)
        self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.last:
            self._write(args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(args)

    def _write(self, args: Any) -> None:
        if self.profiler is None:
            return
        self.profiler.stop()
        folder = Path(args.output_dir)
        suffix = f"_{args.process_index}" if args.world_size > 1 else ""
        self.profiler.export_chrome_trace(str(folder / f"profiler_trace{suffix}.json"))
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(folder / f"snapshot{suffix}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        LOG.info(f"Wrote the profile of steps {self.first} to {self.last} to {folder}.")
        self.profiler = None
