"""Starting and ending a command quickly."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For code that mostly imports, as a block or a decorator.

    Importing torch, transformers and datasets makes a million objects that stay. Python would search them for garbage again and
    again, which takes a fifth of the time of importing.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
