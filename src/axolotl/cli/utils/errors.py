"""An error becomes one screen of text on standard error and an exit code.

Errors of `axolotl.exceptions` print their message alone. Errors that other libraries are known to raise for reasons that
the user can do something about are put into words here. Anything else is one line with the place it came from.
`AXOLOTL_DEBUG=1` adds the traceback to all of them.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
import types
from pathlib import Path

import click

from axolotl.exceptions import AxolotlError, ConfigError

MOST_PROBLEMS = 40  # of a config, that are listed

INTERRUPTED = 130  # what a shell reports for a command that SIGINT ended
TERMINATED = 143  # the same for SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM, on the same way out as Ctrl-C, so that what is half-written is cleaned up."""


def end_cleanly_on_signals() -> None:
    """SIGINT and SIGTERM become `KeyboardInterrupt` and `Terminated` here; forked workers leave it to their parent.

    While training, the trainer has a handler of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    owner = os.getpid()

    def handle(number: int, frame: types.FrameType | None) -> None:
        if os.getpid() != owner:
            # A forked worker. Ctrl-C reaches it too, but it may hold a lock that its parent, who ends it, waits for.
            if number == signal.SIGTERM:
                os._exit(TERMINATED)
            return
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


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
    if any(isinstance(link, Terminated) for link in _chain(error)):
        return TERMINATED
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
