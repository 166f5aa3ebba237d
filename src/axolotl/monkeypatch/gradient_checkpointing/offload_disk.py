"""DISCO - DIsk-based Storage and Checkpointing with Optimized prefetching.

What the backward pass needs is written to disk by worker threads while the forward pass goes on, and read back ahead of its
use. All tensors of a process lie in one file that has no name: the system frees its space when the process ends, however it
ends. Freed pieces of the file are used again, so that it never grows beyond what one step needs.
"""

from __future__ import annotations

import atexit
import itertools
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from axolotl.exceptions import OutputError
from axolotl.monkeypatch.gradient_checkpointing.recompute import Surroundings, run_backward, run_forward
from axolotl.monkeypatch.gradient_checkpointing.transfers import Arriving, Leaving, TransfersByDevice, empty_on_host


class _Arena:
    """Pieces of one nameless file.

    Args:
        directory: where the file lies; None for the system's directory for temporary files.
    """

    def __init__(self, directory: str | None):
        self.directory = directory or tempfile.gettempdir()
        # Unlinked from the start (O_TMPFILE where the system has it).
        self._file = tempfile.TemporaryFile(prefix="axolotl-disco-", dir=self.directory)  # noqa: SIM115 - lives as long as this object
        self._free: dict[int, list[int]] = {}
        self._end = 0
        # Reentrant: collecting garbage, at any moment, may give a piece back.
        self._lock = threading.RLock()

    def allocate(self, num_bytes: int) -> int:
        """Offset of a piece. Only pieces of the same size are reused: the tensors of a model have few sizes."""
        with self._lock:
            if self._free.get(num_bytes):
                return self._free[num_bytes].pop()
            offset, self._end = self._end, self._end + num_bytes
            return offset

    def free(self, offset: int, num_bytes: int) -> None:
        with self._lock:
            self._free.setdefault(num_bytes, []).append(offset)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._end

    def write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], offset + done)

    def read(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            count = os.preadv(self._file.fileno(), [data[done:]], offset + done)
            if not count:
                raise EOFError(f"the file of offloaded activations in {self.directory} ends early")
            done += count

    def close(self) -> None:
        self._file.close()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


@dataclass(eq=False)
class _Kept:
    """A tensor on disk, or on its way.

    Attributes:
        name: what `DiskOffloadManager` calls it.
        like: its shape and dtype.
        leaving: its way to host memory.
        host: the tensor in host memory until it is written.
        writing, reading: work of the threads. `reading` gives the tensor in host memory.
        arriving: the copy to the device, started ahead.
    """

    name: str
    like: torch.Tensor
    device: torch.device
    offset: int
    leaving: Leaving
    host: torch.Tensor | None
    writing: Future[None] = field(default_factory=Future)
    reading: Future[torch.Tensor] | None = None
    arriving: Arriving | None = None

    @property
    def num_bytes(self) -> int:
        return self.like.numel() * self.like.element_size()


class OnDisk:
    """Stands for a tensor in an autograd graph; the disk is freed when the graph lets go of it."""

    __slots__ = ("__weakref__", "name")

    def __init__(self, name: str):
        self.name = name


class DiskOffloadManager:
    """Manages offloaded tensors and handles prefetching in a separate thread. Includes synchronization to prevent race conditions.

    Args:
        prefetch_size: how many tensors are read ahead of the one that is used.
        prefetch_to_gpu: also copy the next one to its device ahead of its use.
        save_workers: threads that write. At most twice as many tensors wait in host memory to be written.
        directory: where to write; None for the system's directory for temporary files (`TMPDIR`).
    """

    def __init__(
        self,
        prefetch_size: int = 1,
        prefetch_to_gpu: bool = True,
        save_workers: int = 4,
        directory: str | None = None,
    ):
        self.prefetch_size = prefetch_size
        self.prefetch_to_gpu = prefetch_to_gpu
        self._arena = _Arena(directory)
        self._transfers = TransfersByDevice()
        self._writers = ThreadPoolExecutor(save_workers, "disco-write")
        self._readers = ThreadPoolExecutor(max(1, prefetch_size), "disco-read")
        self._pending: deque[Future[None]] = deque()
        self._max_pending = 2 * save_workers
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        atexit.register(self.cleanup)

    @property
    def num_bytes(self) -> int:
        """Size of the file on disk."""
        return self._arena.num_bytes

    def save_tensor(self, tensor: torch.Tensor) -> str:
        """Save tensor to disk asynchronously and return the name under which it is kept.

        Raises:
            OutputError: an earlier tensor could not be written.
        """
        transfers = self._transfers.of(tensor.device)
        # On a CPU the tensor itself would be written while the program may go on changing it.
        host, leaving = transfers.send(tensor) if transfers.on_device else (tensor.detach().clone(), Leaving())
        like = torch.empty(host.shape, dtype=host.dtype, device="meta")
        offset = self._arena.allocate(like.numel() * like.element_size())
        kept = _Kept(f"disco-{next(self._numbers):08d}", like, tensor.device, offset, leaving, host)
        while len(self._pending) >= self._max_pending:
            self._result(self._pending.popleft())
        kept.writing = self._writers.submit(self._write, kept, host)
        self._pending.append(kept.writing)
        with self._lock:
            self._kept[kept.name] = kept
        return kept.name

    def wait_for_save(self, name: str) -> None:
        """Wait for a tensor to be saved to disk."""
        self._result(self._kept[name].writing)

    def load_tensor(self, name: str) -> torch.Tensor:
        """Load tensor from disk or prefetch cache, on the device that it came from."""
        kept = self._kept[name]
        transfers = self._transfers.of(kept.device)
        with self._lock:
            arriving, reading = kept.arriving, kept.reading
            kept.arriving = kept.reading = None
        here = transfers.keep(kept.leaving)
        if here is None:
            if arriving is None:
                host = self._result(reading or self._readers.submit(self._read, kept))
                arriving = transfers.fetch(host)
            here = transfers.wait(arriving)
        self.trigger_prefetch(name)
        return here

    def trigger_prefetch(self, name: str) -> None:
        """Trigger prefetching of the tensors that were saved before `name`: they are needed next."""
        with self._lock:
            earlier = [
                other for other in self._kept if other < name and self._kept[other].device == self._kept[name].device
            ]
            wanted = [self._kept[other] for other in earlier[-self.prefetch_size :][::-1]] if self.prefetch_size else []
            for kept in wanted:
                if kept.reading is None and kept.arriving is None:
                    kept.reading = self._readers.submit(self._read, kept)
            if not (wanted and self.prefetch_to_gpu):
                return
            first, transfers = wanted[0], self._transfers.of(wanted[0].device)
            if transfers.on_device and first.arriving is None and first.reading is not None and first.reading.done():
                first.arriving, first.reading = transfers.fetch(self._result(first.reading)), None

    def cleanup_tensor(self, name: str) -> None:
        """Clean up a specific tensor after it has been used. A name that is not there is no error."""
        with self._lock:
            kept = self._kept.pop(name, None)
        if kept is None:
            return
        if kept.arriving is not None:
            self._transfers.of(kept.device).finish(kept.arriving)
        # The piece must not be used again while a thread still writes to it.
        kept.writing.cancel()
        kept.writing.add_done_callback(lambda _: self._arena.free(kept.offset, kept.num_bytes))

    def cleanup(self) -> None:
        """Clean up all temp files and stop prefetch thread with proper synchronization. The manager is of no use afterwards."""
        atexit.unregister(self.cleanup)
        self._writers.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._kept.clear()
        self._arena.close()

    def put(self, tensor: torch.Tensor) -> OnDisk:
        """`save_tensor` for an autograd graph: what it returns frees the disk when it goes away."""
        parked = OnDisk(self.save_tensor(tensor))
        weakref.finalize(parked, self.cleanup_tensor, parked.name).atexit = False
        return parked

    def take(self, parked: OnDisk) -> torch.Tensor:
        """The tensor, on its device."""
        return self.load_tensor(parked.name)

    def _write(self, kept: _Kept, host: torch.Tensor) -> None:
        if kept.leaving.event is not None:
            kept.leaving.event.synchronize()
        self._arena.write(_bytes_of(host.contiguous()), kept.offset)
        kept.host = None

    def _read(self, kept: _Kept) -> torch.Tensor:
        host = kept.host
        if host is not None:
            # Not written yet: what is in memory need not come from the disk.
            if kept.leaving.event is not None:
                kept.leaving.event.synchronize()
            return host
        kept.writing.result()
        host = empty_on_host(kept.like, pinned=kept.device.type != "cpu")
        self._arena.read(_bytes_of(host), kept.offset)
        return host

    def _result(self, work: Future[Any]) -> Any:
        try:
            return work.result()
        except OSError as error:
            raise OutputError(
                f"Activations could not be kept on disk in {self._arena.directory}: {error}. Free some space there, set the "
                "environment variable TMPDIR to a directory on a larger disk, or write `activation_offloading: true` to keep "
                "them in memory."
            ) from error


class Disco(torch.autograd.Function):
    """Disco: DIsk-based Storage and Checkpointing with Optimized prefetching Advanced disk-based gradient checkpointer with prefetching.

    A checkpoint whose input waits on disk: `apply(forward_function, hidden_states, *args)`. As with every reentrant
    checkpoint, `hidden_states` has to require a gradient.
    """

    _instance: DiskOffloadManager | None = None
    _lock = threading.Lock()

    @staticmethod
    def get_instance(prefetch_size: int = 1, prefetch_to_gpu: bool = True, save_workers: int = 4) -> DiskOffloadManager:
        """Get or create the offload manager of this process. The arguments count for the one that is created."""
        with Disco._lock:
            if Disco._instance is None:
                Disco._instance = DiskOffloadManager(prefetch_size, prefetch_to_gpu, save_workers)
            return Disco._instance

    @staticmethod
    def forward(
        ctx: Any,
        forward_function: Callable[..., Any],
        hidden_states: torch.Tensor,
        *args: Any,
        prefetch_size: int = 1,
        prefetch_to_gpu: bool = True,
        save_workers: int = 4,
    ) -> Any:
        """Forward pass that offloads activations to disk asynchronously"""
        manager = Disco.get_instance(prefetch_size, prefetch_to_gpu, save_workers)
        ctx.surroundings = Surroundings.of(hidden_states)
        ctx.parked = manager.put(hidden_states)
        ctx.manager, ctx.forward_function, ctx.args = manager, forward_function, args
        return run_forward(forward_function, hidden_states, args)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[Any, ...]:
        """Backward pass that loads activations from disk with prefetching"""
        hidden_states = ctx.manager.take(ctx.parked)
        return run_backward(ctx.surroundings, ctx.forward_function, hidden_states, ctx.args, grad_outputs)
