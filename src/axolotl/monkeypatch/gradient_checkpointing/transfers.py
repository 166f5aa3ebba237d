"""Copies between an accelerator and pinned host memory, beside the computation.

One side stream per device carries all copies. Order is kept by events alone, so the CPU never waits: a copy out starts when
the computation so far is done, and the memory of what was copied is given back at a point where the computing stream waits
for that copy. A copy in goes to memory of the computing stream, which waits for it only where the tensor is used.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from axolotl.exceptions import first_line
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

STREAMED = ("cuda", "xpu")
MAX_LEAVING = 2


@dataclass(eq=False)
class Leaving:
    """A tensor on its way to the host.

    Attributes:
        event: the end of the copy, or None where the host tensor is valid at once.
        tensor: the tensor itself while its memory has not been given back.
    """

    event: Any = None
    tensor: torch.Tensor | None = None


@dataclass(eq=False)
class Arriving:
    """A tensor on its way to the device; to be used after `Transfers.wait`."""

    tensor: torch.Tensor
    event: Any = None


def empty_on_host(like: torch.Tensor, *, pinned: bool) -> torch.Tensor:
    """Uninitialised host memory like `like`, page-locked where there is an accelerator to copy to.

    The order of the axes in memory is kept: backward kernels of attention read what forward made by its strides, and only
    memory of one order is copied beside the computation.
    """
    if not pinned:
        return torch.empty_like(like, device="cpu")
    try:
        return torch.empty_like(like, device="cpu", pin_memory=True)
    except RuntimeError as error:
        LOG.warning_once(
            f"The system gives no more page-locked memory ({first_line(error)}): activations go to ordinary "
            "memory, and copies no longer run beside the computation."
        )
        return torch.empty_like(like, device="cpu")


class Transfers:
    """The copies of one device.

    Args:
        device: the accelerator. On a CPU nothing needs to move.
        overlap: copy on a side stream; otherwise in order with the computation, which is slower and simpler.
        max_leaving: this many tensors may still be copied out while the computation goes on. Their memory is in use.
    """

    def __init__(self, device: torch.device, *, overlap: bool = True, max_leaving: int = MAX_LEAVING):
        self.device = device
        self.on_device = device.type != "cpu"
        self._module = torch.get_device_module(device) if device.type in STREAMED else None
        self._side = self._module.Stream(device=device) if overlap and self._module is not None else None
        self._leaving: deque[Leaving] = deque()
        self._max_leaving = max_leaving

    def send(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Leaving]:
        """Start the copy of `tensor` to the host.

        Returns:
            The host tensor, valid once the event has happened (on a CPU it is `tensor` itself), and the way there.
        """
        tensor = tensor.detach()
        if not self.on_device:
            return tensor, Leaving(tensor=tensor)
        host = empty_on_host(tensor, pinned=self._module is not None)
        if self._side is None:
            # In stream order: the memory of `tensor` may be given back at once. Without streams the copy is synchronous.
            host.copy_(tensor, non_blocking=self._module is not None)
            return host, Leaving(self._record_on_current())
        self._side.wait_stream(self._current())
        with self._module.stream(self._side):
            host.copy_(tensor, non_blocking=True)
            event = self._module.Event()
            event.record(self._side)
        leaving = Leaving(event, tensor)
        self._leaving.append(leaving)
        while len(self._leaving) > self._max_leaving:
            self._let_go(self._leaving.popleft())
        return host, leaving

    def keep(self, leaving: Leaving) -> torch.Tensor | None:
        """The tensor itself if it has not left yet; then it stays."""
        if leaving in self._leaving:
            self._leaving.remove(leaving)
        return leaving.tensor

    def fetch(self, host: torch.Tensor) -> Arriving:
        """Start the copy of `host` to the device."""
        if not self.on_device:
            return Arriving(host)
        if self._side is None:
            return Arriving(host.to(self.device, non_blocking=self._module is not None))
        # The memory is that of the computing stream. What it was used for before must be over when the copy starts.
        tensor = torch.empty_like(host, device=self.device)
        self._side.wait_stream(self._current())
        with self._module.stream(self._side):
            tensor.copy_(host, non_blocking=True)
            event = self._module.Event()
            event.record(self._side)
        return Arriving(tensor, event)

    def wait(self, arriving: Arriving) -> torch.Tensor:
        """The tensor; what is computed from here on waits for its copy."""
        if arriving.event is not None:
            self._current().wait_event(arriving.event)
        return arriving.tensor

    def finish(self, arriving: Arriving) -> None:
        """Give the memory of an unused tensor back: later computation waits for the copy into it."""
        self.wait(arriving)

    def _let_go(self, leaving: Leaving) -> None:
        self._current().wait_event(leaving.event)
        leaving.tensor = None

    def _current(self) -> Any:
        return self._module.current_stream(self.device)

    def _record_on_current(self) -> Any:
        if self._module is None:
            return None
        event = self._module.Event()
        event.record(self._current())
        return event


class TransfersByDevice:
    """One `Transfers` per device, made when a tensor of that device first comes along."""

    def __init__(self, *, overlap: bool = True):
        self._overlap = overlap
        self._by_device: dict[torch.device, Transfers] = {}
        self._lock = threading.RLock()

    def of(self, device: torch.device) -> Transfers:
        with self._lock:
            if device not in self._by_device:
                self._by_device[device] = Transfers(device, overlap=self._overlap)
            return self._by_device[device]
