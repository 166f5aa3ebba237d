"""Files of a checkpoint, caught on their way to the disk as copies in host memory.

Between entering and leaving `captured_files`, a `torch.save` or safetensors `save_file` of this thread that holds more than a
little copies its tensors and returns; the files are written later, by whoever calls `write` on them. The saving code of
transformers, peft and users' trainers runs unchanged, so that the files are those of a save that waits.
"""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft.peft_model
import safetensors.torch
import torch
import transformers.modeling_utils
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from axolotl.core.safetensors_file import write_safetensors

BLOCK_BYTES = 2**30  # a power of two: torch rounds pinned memory up to one
ALIGNMENT = 64
PAGE_BYTES = 4096
SMALL_BYTES = 2**20  # a file with less is written at once
MEMORY_SHARE = 0.5  # of the free host memory, what a copy may take


@dataclass
class CapturedFile:
    """A file whose content is in host memory.

    Attributes:
        path: where the saving code wanted it.
        write: writes it to a path.
    """

    path: Path
    write: Callable[[Path], None]


class HostMemory:
    """Host memory for copies of tensors, kept from one checkpoint to the next; pinned where tensors come from CUDA.

    `reset` makes all of it free again. Memory is taken in blocks, one after the other, so that equal sizes in equal order
    need no new block.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._current = 0
        self._used = 0
        self.num_bytes = 0  # copied since the last reset

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.numel() for block in self._blocks)

    def reset(self) -> None:
        """Give all of it back to the next copies. The earlier ones must not be used any more."""
        self._current = self._used = self.num_bytes = 0

    def take(self, num_bytes: int, *, pinned: bool) -> torch.Tensor:
        """`num_bytes` (above 0) uninitialised bytes, as a uint8 tensor that owns a storage of exactly that size."""
        self.num_bytes += num_bytes
        while self._current < len(self._blocks):
            block = self._blocks[self._current]
            if self._used + num_bytes <= block.numel() and (block.is_pinned() or not pinned):
                break
            self._current, self._used = self._current + 1, 0
        else:
            size = max(BLOCK_BYTES, 1 << (num_bytes - 1).bit_length())
            self._blocks.append(_pinned_block(size) if pinned else torch.empty(size, dtype=torch.uint8))
        start = self._used
        self._used = -(-(start + num_bytes) // ALIGNMENT) * ALIGNMENT
        # A slice would share the storage of its block, and torch.save writes whole storages.
        return torch.frombuffer(
            memoryview(self._blocks[self._current].numpy())[start : start + num_bytes], dtype=torch.uint8
        )


def _pinned_block(num_bytes: int) -> torch.Tensor:
    """Page-locked memory that is given back with the tensor.

    The pages are taken by writing to them, and locked afterwards. To allocate them locked, as PyTorch does, takes three times
    as long, and no kernel starts meanwhile (12 GiB on an H200's host: 1.7 s beside the training, 4.9 s instead of it).
    """
    block = torch.empty(num_bytes, dtype=torch.uint8)
    block[::PAGE_BYTES] = 0
    runtime: Any = torch.cuda.cudart()
    result = runtime.cudaHostRegister(block.data_ptr(), num_bytes, 0)
    if int(result) != 0:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    weakref.finalize(block, runtime.cudaHostUnregister, block.data_ptr()).atexit = False  # the driver is gone by then
    return block


@dataclass
class HostCopies:
    """Copies of tensors in host memory. What shares memory there shares it here.

    Args:
        memory: where the copies lie.
    """

    memory: HostMemory
    _storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    _tensors: dict[int, torch.Tensor] = field(default_factory=dict)
    _sources: list[Any] = field(default_factory=list)  # alive until all is copied, so that no address is used twice

    def finish(self) -> None:
        """Wait until copies that run on the device's side are done. They read the tensors until then."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._sources.clear()

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy with its own memory: contiguous, of any device, for a file that holds tensors one by one."""
        known = self._tensors.get(id(tensor))
        if known is None:
            if tensor.numel() and not is_traceable_wrapper_subclass(tensor):
                source = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                data = self._copy_bytes(source).view(tensor.dtype)
                known = data.reshape(tensor.shape)
            else:
                known = tensor.detach().to("cpu", copy=True)
            self._keep(tensor, known)
        return known

    def tree(self, value: Any) -> Any:
        """A deep copy of a value with its tensors in host memory, for `torch.save`."""
        memo: dict[int, Any] = {}
        for tensor in find_tensors(value):
            memo[id(tensor)] = self._like(tensor)
        return copy.deepcopy(value, memo)

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy with the strides of `tensor` in a copy of its whole storage, as torch.save writes it."""
        if is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            return tensor.detach().to("cpu", copy=True)
        storage = tensor.untyped_storage()
        copied = self._storages.get(storage._cdata)
        if copied is None:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            data = self._copy_bytes(whole) if whole.numel() else torch.empty(0, dtype=torch.uint8)
            copied = self._storages[storage._cdata] = data.untyped_storage()
            self._sources.append(storage)
        like = torch.empty(0, dtype=tensor.dtype)
        like.set_(copied, tensor.storage_offset(), tensor.size(), tensor.stride())
        return torch.nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else like

    def _copy_bytes(self, source: torch.Tensor) -> torch.Tensor:
        on_cuda = source.device.type == "cuda"
        target = self.memory.take(source.numel(), pinned=on_cuda)
        target.copy_(source, non_blocking=on_cuda)
        self._sources.append(source)
        return target

    def _keep(self, tensor: torch.Tensor, copied: torch.Tensor) -> None:
        self._tensors[id(tensor)] = copied
        self._sources.append(tensor)


def find_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts, lists, tuples and sets."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from find_tensors(inner)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from find_tensors(inner)


def count_bytes(value: Any) -> int:
    """Bytes of the distinct storages in `value`."""
    sizes: dict[int, int] = {}
    for tensor in find_tensors(value):
        if is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided:
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


@contextmanager
def captured_files(memory: HostMemory) -> Iterator[list[CapturedFile]]:
    """Catch the large files that this thread saves; what it saves otherwise, and other threads, go to the disk as ever.

    Args:
        memory: where the copies go. It is reset.

    Yields:
        The files, complete when the context is left.
    """
    memory.reset()
    files: list[CapturedFile] = []
    copies = HostCopies(memory)
    owner = threading.get_ident()
    torch_save, save_file = torch.save, safetensors.torch.save_file

    def capture_torch(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        is_path = isinstance(f, str | os.PathLike)
        if threading.get_ident() != owner or not is_path or count_bytes(obj) < SMALL_BYTES:
            torch_save(obj, f, *args, **kwargs)
            return
        copied = copies.tree(obj)
        files.append(CapturedFile(Path(f), lambda path: torch_save(copied, path, *args, **kwargs)))

    def capture_tensors(
        tensors: dict[str, torch.Tensor], filename: str | os.PathLike[str], metadata: dict[str, str] | None = None
    ) -> None:
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if threading.get_ident() != owner or num_bytes < SMALL_BYTES or not _can_be_copied(tensors):
            save_file(tensors, filename, metadata)
            return
        copied = {name: copies.tensor(tensor) for name, tensor in tensors.items()}
        files.append(CapturedFile(Path(filename), lambda path: write_safetensors(copied, path, metadata)))

    # Somebody else's names, for the time of a save: neither library has a hook for where the bytes go.
    names = (
        (torch, "save", capture_torch),
        (safetensors.torch, "save_file", capture_tensors),
        (transformers.modeling_utils, "safe_save_file", capture_tensors),
        (peft.peft_model, "safe_save_file", capture_tensors),
    )
    before = [(module, name, getattr(module, name)) for module, name, _ in names]
    for module, name, replacement in names:
        setattr(module, name, replacement)
    try:
        yield files
    finally:
        for module, name, original in before:
            setattr(module, name, original)
        copies.finish()


def _can_be_copied(tensors: Mapping[str, torch.Tensor]) -> bool:
    """What the library refuses (shared memory, gaps) it shall refuse now, with its own words."""
    starts = {(tensor.device, tensor.data_ptr()) for tensor in tensors.values() if tensor.numel()}
    distinct = len(starts) == sum(1 for tensor in tensors.values() if tensor.numel())
    return distinct and all(
        tensor.is_contiguous() and tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)
        for tensor in tensors.values()
    )
