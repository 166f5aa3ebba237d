"""Write a safetensors file while other Python threads run.

The library keeps the interpreter's lock while it writes, so that a checkpoint written on a thread would stop the training all
the same. The format is small: the length of a header as 8 bytes (little endian), the header as JSON, the tensors' bytes. The
order of tensors is the library's, so that the file is the same byte by byte.

Source: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# Names of the types in a header, in the order in which the library lays tensors down.
DTYPES: dict[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}
CHUNK_BYTES = 64 * 2**20


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: dict[str, str] | None) -> None:
    """Write contiguous CPU tensors to a file.

    Args:
        tensors: name -> tensor. A type that is not in `DTYPES` leaves the writing to the library.
        path: the file.
        metadata: text of the header.

    Raises:
        OSError: the file cannot be written.
    """
    if not tensors or any(tensor.dtype not in DTYPES for tensor in tensors.values()) or len(metadata or {}) > 1:
        save_file(dict(tensors), path, metadata=metadata)
        return
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name.encode()))
    with open(path, "wb") as file:
        file.write(_header(tensors, names, metadata))
        for name in names:
            data = memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())
            for start in range(0, len(data), CHUNK_BYTES):
                file.write(data[start : start + CHUNK_BYTES])


def _header(tensors: Mapping[str, torch.Tensor], names: list[str], metadata: dict[str, str] | None) -> bytes:
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
