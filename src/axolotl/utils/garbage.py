"""Python's search for garbage, kept away from what importing makes.

Importing torch, transformers and datasets makes a million objects that stay. Python would search them again and again: while
they are imported, while the tokenizer is loaded, while rows are tokenized, and once more on its way out. In a process that is a
command's own (`own_process`) they are set aside for good. A program that imports this package may want back what it holds when
it calls us, so there they are searched again afterwards.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class _Process:
    """What is known of this process."""

    is_ours = False
    has_set_aside = False  # Python would count, object by object, and take longer than what hangs on it


def own_process() -> None:
    """Say that this process is a command's own: what it imports stays until it ends."""
    _Process.is_ours = True


def is_own_process() -> bool:
    """Whether this process is a command's own, and no program's that imports this package."""
    return _Process.is_ours


def end_process(code: int) -> NoReturn:
    """End a process that is a command's own, with its exit code.

    Handlers of `atexit` run and streams are flushed. What would follow, taking a million objects apart, takes a third of a second
    with torch and does nothing, so it is left out; not where a thread is still at work, or a GPU or a process group was used.
    """
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()) or _in_use():
        if "triton" in sys.modules:
            gc.unfreeze()  # its bindings report as leaked what is not collected at the end
        else:
            gc.freeze()
        sys.exit(code)
    gc.freeze()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _in_use() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and (torch.cuda.is_initialized() or torch.distributed.is_initialized())


def set_aside() -> None:
    """Look for garbage only among what is made from here on."""
    _Process.has_set_aside = True
    gc.freeze()


def give_back() -> None:
    """Look for garbage everywhere again."""
    _Process.has_set_aside = False
    gc.unfreeze()


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For code that makes many objects and no cycles, as a block or a decorator."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """For code that mostly imports, as a block or a decorator."""
    with without_garbage_collection():
        try:
            yield
        finally:
            if _Process.is_ours:
                set_aside()


@contextmanager
def collecting_only_new(*, after_setup: bool = False) -> Iterator[None]:
    """Garbage is looked for only among what is made from here on; a forked process copies no memory to look at the rest.

    Args:
        after_setup: much has been made since the imports, such as a model, so that a process of our own sets that aside, too.
            All of it is given back afterwards, with what was imported: the model may be let go then.
    """
    if not (_Process.is_ours and after_setup) and (_Process.has_set_aside or gc.get_freeze_count()):
        yield
        return
    set_aside()
    try:
        yield
    finally:
        give_back()
