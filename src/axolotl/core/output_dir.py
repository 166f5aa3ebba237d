"""The folder of a run: whether it can be written, whether it is still there, and where to write when it is not."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from axolotl.exceptions import OutputError


def check_output_dir(output_dir: str | Path, *, min_free_bytes: int = 16 * 2**20) -> None:
    """Raise `OutputError` unless files can be written to `output_dir`. Makes the folder.

    Args:
        output_dir: folder of the run.
        min_free_bytes: less free space than this counts as a full disk.
    """
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output_dir, prefix=".write-test-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(output_dir).free
    except OSError as error:
        raise OutputError(
            f"`output_dir: {output_dir}` cannot be written ({error.strerror or error}). Nothing was trained. "
            "Choose another `output_dir`, or make this one writable."
        ) from error
    if free < min_free_bytes:
        raise OutputError(
            f"`output_dir: {output_dir}` is on a disk with {free / 2**20:.0f} MiB left, too little for a checkpoint. "
            "Nothing was trained. Free some space or choose another `output_dir`."
        )


def rescue_dirs(output_dir: str | Path) -> list[Path]:
    """Where to save when `output_dir` cannot be written: beside it, then in the folder for temporary files."""
    name = f"{Path(output_dir).name}-rescued"
    return list(dict.fromkeys([Path(output_dir).absolute().parent / name, Path(tempfile.gettempdir()) / name]))


class OutputFolder:
    """`output_dir` as it is when a run begins, to notice later that it has gone.

    Writing on would make a new folder, on whatever disk lies under a mount that was lost.

    Args:
        path: the folder; made when missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._identity = self._identify()

    def check(self) -> None:
        """Raise `OutputError` when the folder is not there any more."""
        try:
            now = self._identify()
        except FileNotFoundError as error:
            raise OutputError(f"{self.path} is gone: it was deleted, or its mount was lost") from error
        # Mounted anew, a folder may be on another device, but it keeps its number there.
        if all(new != old for new, old in zip(now, self._identity, strict=True)):
            raise OutputError(f"{self.path} is another folder than at the start of the run: its mount was lost")

    def _identify(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_dev, status.st_ino


def is_write_error(error: BaseException) -> bool:
    """Whether a library failed to write a file. torch says so with a RuntimeError of its zip writer, safetensors in its own way."""
    words = ("PytorchStreamWriter", "iostream error", "unexpected pos", "No space left", "os error", "Disk quota")
    return isinstance(error, OSError | SafetensorError) or any(word in str(error) for word in words)
