"""A thread that writes one checkpoint at a time while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class CheckpointWriter:
    """Runs the writing of a checkpoint on a thread of its own.

    The thread is not a daemon: a process that ends, also by an exception, waits for it. A killed process leaves a folder
    that is not under a checkpoint's name yet.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written and nobody took its error yet."""
        return self._error is not None

    def start(self, work: Callable[[], None], name: str) -> None:
        """Run `work` on a thread. The one before must have been waited for.

        Args:
            work: writes and seals a checkpoint.
            name: of the thread.
        """
        if self._thread is not None:
            raise RuntimeError("the checkpoint before is still being written")

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised where the training notices, see `take_error`
                LOG.warning(f"{name} could not be written: {error}")
                self._error = error

        self._thread = threading.Thread(target=run, name=name)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises nothing: see `failed` and `take_error`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_error(self) -> BaseException | None:
        """The error of a checkpoint that could not be written, once."""
        error, self._error = self._error, None
        return error
