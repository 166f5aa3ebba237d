"""Folders for what a run reads through and nobody needs afterwards."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def temporary_folder(prefix: str, parent: str | Path | None = None) -> Path:
    """A new folder that is removed when this process ends; a killed process leaves it to the system.

    Args:
        prefix: of its name.
        parent: where it is made; by default where the system keeps temporary files (`TMPDIR`).
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)
