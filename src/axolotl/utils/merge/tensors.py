"""Weight files read and written one tensor at a time.

The writer lays a safetensors file out from shapes alone, then fills it tensor by tensor, so that a merge holds one layer
in memory and never a whole shard. The format is eight bytes of header length, a JSON header, and the raw tensors:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from axolotl.exceptions import ModelError

DTYPE_NAMES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file, not read yet."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorStore:
    """The tensors of a model or adapter folder. At most one file is open, and one tensor is read at a time."""

    def __init__(self, files: list[Path]):
        self.tensors: dict[str, TensorInfo] = {}
        self._open_path: Path | None = None
        self._open: Any = None
        for file in files:
            infos = _safetensors_infos(file) if file.suffix == ".safetensors" else self._pickle_infos(file)
            self.tensors.update((info.name, info) for info in infos)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU, in its stored dtype."""
        self._switch_to(self.tensors[name].file)
        return self._open[name] if isinstance(self._open, dict) else self._open.get_tensor(name)

    def close(self) -> None:
        self._open = self._open_path = None

    def _switch_to(self, file: Path | None) -> None:
        if file == self._open_path:
            return
        self.close()
        assert file is not None
        if file.suffix == ".safetensors":
            self._open = safe_open(file, framework="pt", device="cpu")
        else:
            self._open = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        self._open_path = file

    def _pickle_infos(self, file: Path) -> Iterator[TensorInfo]:
        self._switch_to(file)
        for name, tensor in self._open.items():
            yield TensorInfo(name, tensor.dtype, tuple(tensor.shape), file)


def model_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, in the order of their names.

    Raises:
        ModelError: the folder holds no weights, or its index names a file that is missing.
    """
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise ModelError(
                    f"`{folder / index}` names {', '.join(missing)}, which is not there. Download the base model again."
                )
            return [folder / name for name in names]
        single = folder / index.removesuffix(".index.json")
        if single.is_file():
            return [single]
    raise ModelError(
        f"`{folder}` holds no model weights (looked for model.safetensors, pytorch_model.bin and their index files)."
    )


def adapter_file(folder: Path) -> Path:
    """The weight file of an adapter folder."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"`{folder}` holds no adapter weights (looked for adapter_model.safetensors, adapter_model.bin).")


def split_into_shards(infos: list[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Consecutive tensors, together at most `max_bytes` unless a single tensor is larger."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if shards[-1] and size + info.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.num_bytes
    return shards


def write_model(
    folder: Path, infos: list[TensorInfo], produce: Callable[[str], torch.Tensor], *, max_shard_bytes: int
) -> None:
    """Write `infos` as one or more safetensors files with an index.

    Args:
        produce: name -> the tensor, in the dtype and shape its `TensorInfo` announced. Called once per tensor, in order.
    """
    shards = split_into_shards(infos, max_shard_bytes)
    if len(shards) == 1:
        _write_shard(folder / "model.safetensors", shards[0], produce)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, produce)
        weight_map.update(dict.fromkeys((info.name for info in shard), name))
    total = sum(info.num_bytes for info in infos)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def parse_size(size: str | int) -> int:
    """Bytes in `5GB` (10^9) or `5GiB` (2^30), and of other units; a number is bytes."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", size, re.IGNORECASE)
    if not match:
        raise ModelError(f"`{size}` is not a size. Write it as `5GB`, `500MB` or `24GiB`.")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))


def _safetensors_infos(file: Path) -> list[TensorInfo]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= file.stat().st_size:
            raise ModelError(f"`{file}` is not a safetensors file, or was cut short. Download or save it again.")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    if entries and 8 + length + entries[-1][1]["data_offsets"][1] != file.stat().st_size:
        raise ModelError(f"`{file}` was cut short: its header announces more bytes than it holds. Save it again.")
    unknown = sorted({entry["dtype"] for _, entry in entries} - DTYPE_NAMES.keys())
    if unknown:
        raise ModelError(f"`{file}` holds tensors of dtype {', '.join(unknown)}, which cannot be merged into.")
    return [TensorInfo(name, DTYPE_NAMES[entry["dtype"]], tuple(entry["shape"]), file) for name, entry in entries]


def _write_shard(path: Path, infos: list[TensorInfo], produce: Callable[[str], torch.Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in infos:
        end = offset + info.num_bytes
        header[info.name] = {
            "dtype": NAMES_OF_DTYPES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for info in infos:
            tensor = produce(info.name)
            if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
                other = tuple(tensor.shape) != info.shape
                why = " The base model is not the one that the adapter was trained on." if other else ""
                raise ModelError(
                    f"`{info.name}` came out as {tensor.dtype} {tuple(tensor.shape)} "
                    f"where {info.dtype} {info.shape} was announced.{why}"
                )
            stream.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        stream.flush()
        os.fsync(stream.fileno())
