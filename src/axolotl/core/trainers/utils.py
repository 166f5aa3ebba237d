"""Utils for Axolotl trainers: tags of a pushed model, memory in use, random state, evaluation mode."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

GIB = 2**30


def is_hub_name(path: Any) -> bool:
    """Whether a dataset path looks like `owner/name` on the hub."""
    text = str(path or "")
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).exists()


def sanitize_kwargs_for_tagging(
    tag_names: str | Iterable[str], dataset_tags: list[str] | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """`kwargs` of `push_to_hub` with our tags, and the datasets' names unless given."""
    given = kwargs.get("tags") or []
    given = [given] if isinstance(given, str) else list(given)
    ours = [tag_names] if isinstance(tag_names, str) else list(tag_names)
    kwargs = {**kwargs, "tags": [*given, *(tag for tag in ours if tag not in given)]}
    if dataset_tags and "dataset_tags" not in kwargs:
        kwargs["dataset_tags"] = dataset_tags
    return kwargs


def memory_metrics(device: torch.device) -> dict[str, float]:
    """GiB of the accelerator: peak in use, peak allocated, reserved now. Empty on a CPU."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        return {
            "memory/max_active (GiB)": round(stats.get("active_bytes.all.peak", 0) / GIB, 2),
            "memory/max_allocated (GiB)": round(torch.cuda.max_memory_allocated(device) / GIB, 2),
            "memory/device_reserved (GiB)": round(torch.cuda.memory_reserved(device) / GIB, 2),
        }
    if device.type == "mps":
        allocated = round(torch.mps.current_allocated_memory() / GIB, 2)
        return {
            "memory/max_active (GiB)": allocated,
            "memory/max_allocated (GiB)": allocated,
            "memory/device_reserved (GiB)": round(torch.mps.driver_allocated_memory() / GIB, 2),
        }
    return {}


@contextmanager
def kept_random_state() -> Iterator[None]:
    """What runs inside draws from copies of the generators: an evaluation must not change the training after it.

    Even iterating a `DataLoader` draws a number, so that a run resumed from a checkpoint that was saved before an evaluation
    would go on with other dropout masks than the run that made the evaluation.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module of the model is in the mode, training or evaluation, that it was in."""
    was_training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module of the model is in eval mode; afterwards as in `kept_modes`. No gradients are kept."""
    with kept_modes(model), torch.no_grad():
        model.eval()
        yield
