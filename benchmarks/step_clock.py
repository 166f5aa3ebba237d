"""When each step of a run ended, by its trainer's own log lines: the stopwatch of `row.py`, the same for every framework.

A run with `logging_steps: 1` reads its loss from the GPU after each step, so that a log line is also the end of the step's work;
nothing is synchronized for the sake of the measurement. Needs only what every trainer of the transformers family has.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from typing import Any

import torch
from transformers import TrainerCallback

PATH = "STEP_CLOCK"
"""Environment variable: the file to write."""

VERSIONS = ("torch", "transformers", "peft", "trl", "liger-kernel", "flash-attn", "axolotl", "unsloth", "llamafactory")


def installed_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class StepClock(TrainerCallback):
    """Writes a line of JSON when training begins and one per logged step: time, step, peak memory, what was logged."""

    def __init__(self) -> None:
        self.path = os.environ[PATH]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with open(self.path, "w") as file:
            file.write(json.dumps({"time": time.time(), "versions": installed_versions()}) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        line: dict[str, Any] = {"time": time.time(), "step": state.global_step, "peak_gib": None}
        if torch.cuda.is_available():
            line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        line["logs"] = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
