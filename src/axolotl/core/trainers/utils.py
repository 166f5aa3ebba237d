"""Utils for Axolotl trainers: tags of a pushed model, memory in use, random state, evaluation mode."""

from __future__ import annotations

import itertools
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
        stats = torch.cuda.memory_stats(device)  # also what `max_memory_allocated` and the like read, each time anew
        return {
            "memory/max_active (GiB)": round(stats.get("active_bytes.all.peak", 0) / GIB, 2),
            "memory/max_allocated (GiB)": round(stats.get("allocated_bytes.all.peak", 0) / GIB, 2),
            "memory/device_reserved (GiB)": round(stats.get("reserved_bytes.all.current", 0) / GIB, 2),
        }
    if device.type == "mps":
        allocated = round(torch.mps.current_allocated_memory() / GIB, 2)
        return {
            "memory/max_active (GiB)": allocated,
            "memory/max_allocated (GiB)": allocated,
            "memory/device_reserved (GiB)": round(torch.mps.driver_allocated_memory() / GIB, 2),
        }
    return {}


def float64_device(device: torch.device) -> torch.device:
    """Where float64 can live: MPS, for one, has none."""
    return device if device.type == "cuda" else torch.device("cpu")


class HostValues:
    """Numbers of small tensors of a GPU, read together: one wait instead of one for each."""

    def __init__(self) -> None:
        self._read: list[tuple[torch.Tensor, int, list[float]]] = []
        self._sent: list[tuple[torch.Tensor, int]] = []
        self._on_host = torch.zeros(0)
        self._arrival: torch.cuda.Event | None = None

    def send(self, *tensors: torch.Tensor) -> None:
        """Begin to copy the values of tensors on one device, as they are at this point of its work. Waits for nothing.

        Args:
            tensors: of any shape and of a type that float64 holds exactly: integers up to 2**53, floats.
        """
        place = float64_device(tensors[0].device)
        joined = torch.cat([tensor.detach().reshape(-1).to(place).double() for tensor in tensors])
        self._sent = [(tensor, tensor._version) for tensor in tensors]
        self._on_host, self._arrival = joined, None
        if joined.is_cuda:
            self._on_host = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=True)
            self._on_host.copy_(joined, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def receive(self) -> None:
        """Wait for the values that were sent last, though not for what the device does after. Those before are forgotten."""
        if self._arrival is not None:
            self._arrival.synchronize()
        values = iter(self._on_host.tolist())
        self._read = [
            (tensor, version, list(itertools.islice(values, tensor.numel()))) for tensor, version in self._sent
        ]

    def of(self, tensor: torch.Tensor) -> list[float]:
        """All values of a tensor: those that were received if it is still the same, else it is asked."""
        for known, version, values in self._read:
            if known is tensor and tensor._version == version:
                return values
        return tensor.detach().reshape(-1).tolist()


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
