"""Processes that end with the one that started them, however that one ends.

A process that is killed, or that a signal ends, cannot tell its children. They would go on, hold memory and devices, and keep
alive what `multiprocessing` starts beside them.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """Let this process, which `multiprocessing` started, end at once when the one that asked for it is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def init_worker(worker_id: int, then: Callable[[int], None] | None = None) -> None:
    """`worker_init_fn` of a DataLoader.

    torch's own watch looks at the parent's number, which with `forkserver` is that of a server that lives as long as its workers.

    Args:
        worker_id: the worker's number.
        then: what else to call with it.
    """
    end_with_parent()
    if then is not None:
        then(worker_id)
