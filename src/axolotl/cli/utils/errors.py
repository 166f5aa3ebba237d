"""An error becomes one screen of text on standard error and an exit code.

Errors of `axolotl.exceptions` print their message alone. Errors that other libraries are known to raise for reasons that
the user can do something about are put into words here. Anything else is one line with the place it came from.
`AXOLOTL_DEBUG=1` adds the traceback to all of them.
"""

from __future__ import annotations

import atexit
import errno
import math
import os
import signal
import sys
import threading
import time
import traceback
import types
from pathlib import Path

import click

from axolotl.exceptions import AxolotlError, ConfigError
from axolotl.utils.garbage import is_own_process
from axolotl.utils.processes import SAME_WISH_SECONDS, STOP_SIGNALS

MOST_PROBLEMS = 40  # of a config, that are listed

INTERRUPTED = 128 + signal.SIGINT  # what a shell reports for a command that Ctrl-C ended


class Terminated(KeyboardInterrupt):
    """Another signal of `STOP_SIGNALS`, on the same way out as Ctrl-C, so that what is half-written is cleaned up.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__(number)
        self.number = number


REPEAT_SECONDS = 0.01


class _Stop:
    """What is known of the wish to end this process."""

    asked_at = -math.inf
    is_leaving = False


def end_cleanly_on_signals() -> None:
    """Stop signals become `KeyboardInterrupt` and `Terminated` here; forked workers leave it to their parent.

    What comes within a second of a signal is the same wish: a launcher passes on what all were sent. While training, the trainer
    has a handler of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    owner = os.getpid()

    def handle(number: int, frame: types.FrameType | None) -> None:
        if os.getpid() != owner:
            # A forked worker. Ctrl-C reaches it too, but it may hold a lock that its parent, who ends it, waits for.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if time.monotonic() - _Stop.asked_at < SAME_WISH_SECONDS:
            return
        _Stop.asked_at = time.monotonic()
        if _Stop.is_leaving:
            os._exit(128 + number)
        error = KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
        if is_own_process() and _is_importing(frame):
            # Many a module takes an exception in an import of its own for a package that is missing, and goes on without it.
            leave()
            code = report_error(error)
            atexit._run_exitfuncs()
            os._exit(code)
        raise error

    for number in STOP_SIGNALS:
        # `nohup` ignores SIGHUP. A shell lets what it starts in the background ignore Ctrl-C, which may be sent on purpose.
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)
    if is_own_process():
        sys.unraisablehook = _repeat_if_lost


def leave() -> None:
    """Nothing waits for an exception from here on: a signal ends the process at once."""
    _Stop.is_leaving = True


def _repeat_if_lost(unraisable: sys.UnraisableHookArgs) -> None:
    """Send a signal again that came where Python ignores exceptions, such as in a finalizer."""
    error = unraisable.exc_value
    if not isinstance(error, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    _Stop.asked_at = -math.inf
    number = error.number if isinstance(error, Terminated) else signal.SIGINT
    again = threading.Timer(REPEAT_SECONDS, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _is_importing(frame: types.FrameType | None) -> bool:
    """Whether an import is under way in a stack of calls."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


_OOM_REMEDY = (
    "Write a smaller `micro_batch_size` (and a larger `gradient_accumulation_steps`), a smaller `sequence_len`, or "
    "`gradient_checkpointing: true`. `axolotl plan CONFIG` forecasts the memory of each part."
)


def report_error(error: BaseException) -> int:
    """Print `error` for the person at the terminal and return the exit code of the process."""
    if isinstance(error, click.Abort) and isinstance(error.__cause__, EOFError):
        error = error.__cause__  # click takes every end of file for Ctrl-D at a question; this one is a file cut short
    if os.environ.get("AXOLOTL_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    rank = f"[rank {os.environ.get('RANK', '0')}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"{rank}{explain_error(error)}", file=sys.stderr, flush=True)
    for link in _chain(error):
        if isinstance(link, Terminated):
            return 128 + link.number
    return INTERRUPTED if _is_interrupt(error) else 1


def explain_error(error: BaseException) -> str:
    """The text shown for `error`, without a traceback."""
    if _is_interrupt(error):
        return "Interrupted."
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        # A problem of several lines stays under its number.
        problems = [problem.replace("\n", "\n     ") for problem in error.problems[:MOST_PROBLEMS]]
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        more = len(error.problems) - len(problems)
        rest = f"\n  ... and {more:,} more." if more else ""
        return f"Error: the config has {len(error.problems):,} problems:\n{lines}{rest}"
    if isinstance(error, AxolotlError):
        return f"Error: {error}"
    if _is_a(error, "torch", "OutOfMemoryError"):
        return f"Error: the device ran out of memory. {_OOM_REMEDY}\n  ({_first_line(error)})"
    if isinstance(error, MemoryError):
        return f"Error: this machine ran out of main memory. {_OOM_REMEDY}"
    if hub_message := _explain_hub_error(error):
        return f"Error: {hub_message}\n  ({_first_line(error)})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"Error: no space left on the disk{_of_path(error)}. Free some, or point `output_dir` elsewhere."
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return (
            f"Error: no file can have a name as long as `{str(error.filename)[:80]}...`. Check the paths of the config."
        )
    if isinstance(error, PermissionError):
        return f"Error: permission denied{_of_path(error)}. Check its owner and mode, or choose another path."
    notes = "".join(f"  {note}\n" for note in getattr(error, "__notes__", ()))
    return (
        f"Error: {type(error).__name__}: {_first_line(error)}\n{notes}"
        f"  at {innermost_frame(error)}; set AXOLOTL_DEBUG=1 for the traceback."
    )


def _explain_hub_error(error: BaseException) -> str | None:
    for link in _chain(error):
        if _is_a(link, "huggingface_hub.errors", "GatedRepoError"):
            return (
                "this repository of the Hugging Face hub is gated. Accept its terms on its page, then run "
                "`hf auth login` or set HF_TOKEN."
            )
        if _is_a(link, "huggingface_hub.errors", "RepositoryNotFoundError"):
            return (
                "the Hugging Face hub has no such repository, or it is private. Check the spelling of the name; for a "
                "private one run `hf auth login` or set HF_TOKEN."
            )
        offline = _is_a(link, "huggingface_hub.errors", "OfflineModeIsEnabled", "LocalEntryNotFoundError")
        # The hub's client is httpx, or httpx2 in newer versions.
        if offline or any(_is_a(link, client, "ConnectError", "ConnectTimeout") for client in ("httpx", "httpx2")):
            return (
                "a file of the Hugging Face hub is needed, is not in the local cache, and the hub cannot be reached. "
                "Check the network (and HF_HUB_OFFLINE), or write a local path."
            )
    return None


def _is_interrupt(error: BaseException) -> bool:
    """Ctrl-C, also where an import that it hit turned it into an ImportError."""
    return any(isinstance(link, (KeyboardInterrupt, click.Abort)) for link in _chain(error))


def _chain(error: BaseException) -> list[BaseException]:
    """`error`, its cause, the cause of that, and so on."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def innermost_frame(error: BaseException) -> str:
    """`file:line` of the deepest frame that lies in this package, or of the deepest frame at all."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).resolve().parents[2])
    ours = [frame for frame in frames if frame.filename.startswith(package)]
    if not frames:
        return "an unknown place"
    frame = (ours or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def _is_a(error: BaseException, module: str, *names: str) -> bool:
    """Whether `error` is one of these classes of a module that need not be installed or imported."""
    loaded = sys.modules.get(module)
    classes = tuple(cls for name in names if isinstance(cls := vars(loaded).get(name), type)) if loaded else ()
    return isinstance(error, classes)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:500]


def _of_path(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""
