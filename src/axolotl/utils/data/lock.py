"""One process prepares, the others wait for the result on disk.

The lock is the operating system's (`flock`): it is gone the moment its owner dies, so a killed run leaves nothing to clean
up, and nobody waits inside a collective, which would time out.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from axolotl.exceptions import OutputError
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

POLL_SECONDS = 0.5
TELL_SECONDS = 60.0


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; says every minute who holds it while waiting."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"`dataset_prepared_path: {path.parent}` cannot be written: {error}. Choose another folder."
        ) from error
    lock = FileLock(str(path))
    owner = path.with_suffix(".owner")
    waited = time.monotonic()
    while not lock.is_locked:
        try:
            lock.acquire(timeout=TELL_SECONDS, poll_interval=POLL_SECONDS)
        except Timeout:
            minutes = (time.monotonic() - waited) / 60
            LOG.info(f"waiting for {_read(owner)} to prepare the dataset ({minutes:.0f} min, lock {path})")
        except OSError as error:
            raise OutputError(
                f"`dataset_prepared_path: {path.parent}` cannot be locked: {error}. Choose another folder."
            ) from error
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _read(owner: Path) -> str:
    try:
        return owner.read_text() or "another process"
    except OSError:
        return "another process"


class FileLockLoader:
    """Runs a load function in one process at a time, so that the first prepares and the others find the result.

    Args:
        cfg: `dataset_prepared_path` is read.
    """

    def __init__(self, cfg: DictDefault):
        self.lock_file_path = Path(cfg.dataset_prepared_path or "last_run_prepared") / "datasets_prep.lock"

    def load(self, load_fn: Callable[[], Any]) -> Any:
        """Call `load_fn` under the lock and return what it returns."""
        with hold_lock(self.lock_file_path):
            return load_fn()

    def cleanup(self) -> None:
        """Remove the lock file."""
        self.lock_file_path.unlink(missing_ok=True)
