"""When each step of a run ended, by its trainer's own log lines: the stopwatch of `row.py`, the same for every framework.

A run with `logging_steps: 1` reads its loss from the GPU after each step, so that a log line is also the end of the step's work;
nothing is synchronized for the sake of the measurement. Needs only what every trainer of the transformers family has.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

PATH = "STEP_CLOCK"
"""Environment variable: the file to write."""

TOKENS_OF_ROWS = "tokens_of_rows"
"""Log entry: tokens since the start, counted in the rows."""

VERSIONS = (
    "torch", "triton", "transformers", "peft", "trl", "datasets", "bitsandbytes", "liger-kernel", "flash-attn", "flash-attn-4",
    "xformers", "axolotl", "unsloth", "unsloth_zoo", "llamafactory",
)  # fmt: skip


def installed_versions() -> dict[str, str]:
    """Of the distributions in `VERSIONS`: flash-attn-4 and flash-attn 2 are both the module `flash_attn`."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def tokens_by_step(lengths: Iterable[int], rows_per_step: int, steps: int) -> list[int]:
    """Tokens of each step where rows are read in their order, epoch after epoch. The last step of an epoch may have fewer rows."""
    rows = list(lengths)
    epoch = [sum(rows[place : place + rows_per_step]) for place in range(0, len(rows), rows_per_step)]
    return list(itertools.islice(itertools.cycle(epoch), steps))


class StepClock(TrainerCallback):
    """Writes a line of JSON when training begins and one per logged step: time, step, peak memory, what was logged.

    Args:
        tokens: of each step, without padding, where the trainer logs no such number and it is known from the rows.
    """

    def __init__(self, tokens: Sequence[int] | None = None) -> None:
        self.path = os.environ[PATH]
        self.totals = None if tokens is None else list(itertools.accumulate(tokens))

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
        if self.totals is not None:
            line["logs"][TOKENS_OF_ROWS] = self.totals[state.global_step - 1]
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
