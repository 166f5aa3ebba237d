"""Prepared datasets on disk: `<dataset_prepared_path>/<key>`, whole or not at all.

A dataset is written to a folder aside, flushed, marked and renamed. One that it takes the place of is renamed away first, so
that a process that is killed never leaves half of either under the final name. The marker lists the files with size and digest;
a folder without a valid marker, or with other files than it lists, is said so and built again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from datasets import Dataset, load_from_disk

from axolotl.exceptions import OutputError
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

MARKER = "axolotl_dataset.json"
WHOLE_DIGEST_BYTES = 64 << 20
"""Files up to this size are digested whole, larger ones by their ends: starting a run must not read a terabyte."""


@contextmanager
def build_folder(root: Path, key: str) -> Iterator[Path]:
    """A folder next to the final one for everything that is made on the way; removed afterwards."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"{key}.building-*"):
            shutil.rmtree(left, ignore_errors=True)  # of a killed run: the caller holds the lock
        folder = Path(tempfile.mkdtemp(prefix=f"{key}.building-", dir=root))
    except OSError as error:
        raise OutputError(
            f"`dataset_prepared_path: {root}` cannot be written: {error}. Choose another folder."
        ) from error
    try:
        yield folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OutputError(
            f"`dataset_prepared_path: {root}` is on a disk without space for the prepared rows ({error.strerror}). Free some, "
            "or choose another folder."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_prepared(
    dataset: Dataset, folder: Path, report: dict[str, Any], aside: Path, num_shards: int | None = None
) -> None:
    """Write a prepared dataset.

    Args:
        dataset: prepared rows.
        folder: where it will stand.
        report: kept in the marker.
        aside: an empty folder on the same disk to write into first.
        num_shards: Arrow files to write; by size when None.
    """
    whole = (aside / "whole").absolute()  # `datasets` would look for a user in `~name`
    try:
        dataset.save_to_disk(str(whole), num_shards=num_shards and min(num_shards, max(len(dataset), 1)))
        files = {file.name: [file.stat().st_size, _digest(file)] for file in sorted(whole.iterdir())}
        (whole / MARKER).write_text(json.dumps({"rows": len(dataset), "files": files, "report": report}, indent=1))
        for file in whole.iterdir():
            _flush(file)
        _flush(whole)
        if folder.exists():
            os.replace(folder, aside / "replaced")  # goes when `aside` does
        os.replace(whole, folder)
        _flush(folder.parent)
    except OSError as error:
        raise OutputError(
            f"the prepared dataset cannot be written to {folder}: {error}. Choose another `dataset_prepared_path`."
        ) from error


def load_prepared(folder: Path, keep_in_memory: bool = False) -> tuple[Dataset, dict[str, Any]] | None:
    """A prepared dataset and its report, or None when there is none that is whole.

    Needs no lock: where another process puts a new dataset in the place of the one that is being opened, the new one is opened.
    """
    while (opened := _standing(folder)) is not None:
        found, damage = _load(folder, keep_in_memory)
        if _standing(folder) != opened:
            continue
        if found is None:
            LOG.warning_once(f"the prepared dataset in {folder} is damaged ({damage}); it is built again.")
        return found
    return None


def _standing(folder: Path) -> tuple[int, bytes | None] | None:
    """What tells the dataset in a folder from one that takes its place, whole or damaged; None without a folder."""
    try:
        number = folder.stat().st_ino
    except OSError:
        return None
    try:
        return number, (folder / MARKER).read_bytes()
    except OSError:
        return number, None


def _load(folder: Path, keep_in_memory: bool) -> tuple[tuple[Dataset, dict[str, Any]] | None, str | None]:
    """`(dataset and report, None)`, or `(None, what is wrong with the folder)`."""
    damage = find_damage(folder)
    if damage is not None:
        return None, damage
    try:
        dataset = load_from_disk(str(folder), keep_in_memory=keep_in_memory)
        marker = json.loads((folder / MARKER).read_text())
        if isinstance(dataset, Dataset) and len(dataset) == marker["rows"]:
            return (dataset, marker["report"]), None
        return None, "the number of rows is not the one that was written"
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        return None, f"{type(error).__name__}: {error}"


def find_damage(folder: Path) -> str | None:
    """Why a folder is no whole prepared dataset, or None."""
    try:
        files = json.loads((folder / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no valid {MARKER}: {type(error).__name__}"
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        try:
            found = file.stat().st_size
            same = found == size and _digest(file) == digest
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if not same:
            return f"{name} has other content than was written"
    return None


def _digest(file: Path) -> str:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        if size <= WHOLE_DIGEST_BYTES:
            return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
        digest = xxhash.xxh3_128(stream.read(WHOLE_DIGEST_BYTES // 2))
        stream.seek(-WHOLE_DIGEST_BYTES // 2, os.SEEK_END)
        digest.update(stream.read())
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
