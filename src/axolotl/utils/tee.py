"""A copy of everything the run prints, in `<output_dir>/debug.log`."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any, TextIO

from axolotl.exceptions import OutputError

# Colours and cursor movements, which are for a terminal.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ENVIRONMENT_OFF = ("0", "false", "no", "off")


class Tee:
    """A text stream that writes to another one and, without colours, to a file."""

    def __init__(self, stream: TextIO, file: TextIO):
        self._stream = stream
        self._file = file

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        if not self._file.closed:
            try:
                self._file.write(CONTROL.sub("", text))
            except OSError as error:
                self._give_up(error)
        return written

    def flush(self) -> None:
        self._stream.flush()
        if not self._file.closed:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """A full disk must not end a run for its log: go on without the copy."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._stream.write(f"The log {self._file.name} cannot be written any more: {error.strerror or error}.\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class DebugLog:
    """Standard output and error, copied into one file while it is open. `logging` handlers on them follow."""

    def __init__(self, path: Path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Line by line, so that a killed process has written what it printed.
            self._file = path.open("a", encoding="utf-8", errors="replace", buffering=1)
        except OSError as err:
            raise OutputError(
                f"`output_dir: {path.parent}` cannot be written: {_explain(err, path)}. Choose another `output_dir`."
            ) from err
        self._before = (sys.stdout, sys.stderr)
        self._ours = (Tee(sys.stdout, self._file), Tee(sys.stderr, self._file))
        sys.stdout, sys.stderr = self._ours  # type: ignore[assignment]
        _move_handlers(self._before, self._ours)

    def close(self) -> None:
        """Give the streams back. Safe to call twice."""
        if sys.stdout is self._ours[0]:
            sys.stdout = self._before[0]
        if sys.stderr is self._ours[1]:
            sys.stderr = self._before[1]
        _move_handlers(self._ours, self._before)
        with contextlib.suppress(OSError):
            self._file.close()


def _explain(error: OSError, path: Path) -> str:
    in_the_way = next((folder for folder in path.parents if os.path.isfile(folder)), None)
    return f"{in_the_way} is a file" if in_the_way else str(error.strerror or error)


_open: list[DebugLog] = []


def prepare_debug_log(cfg: Any, filename: str = "debug.log") -> str | None:
    """Begin to copy standard output and error into `<output_dir>/<filename>`. A log that is open already is closed.

    The first process of a machine writes, after what the file already holds: an evaluation keeps the log of the training.
    The environment variable AXOLOTL_TEE_STDOUT=0 turns it off.

    Returns:
        The path of the log, or None when none is written.

    Raises:
        OutputError: `output_dir` cannot be written.
    """
    off = os.environ.get("AXOLOTL_TEE_STDOUT", "1").lower() in ENVIRONMENT_OFF
    if off or not cfg.output_dir or os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    close_debug_log()
    path = Path(cfg.output_dir) / filename
    _open.append(DebugLog(path))
    return str(path)


def close_debug_log() -> None:
    """Stop copying. Does nothing when no log is open."""
    while _open:
        _open.pop().close()


atexit.register(close_debug_log)


def _move_handlers(before: tuple, after: tuple) -> None:
    """Logging handlers keep the stream that they were made with; point those of `before` to `after`."""
    for name in [None, *logging.root.manager.loggerDict]:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in before:
                # Not `setStream`, which flushes a stream that may be closed by now.
                handler.stream = after[before.index(handler.stream)]
