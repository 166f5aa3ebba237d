"""One thread a process, so that sums of floats are added up in one order everywhere, and no network."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
from hypothesis import settings

from axolotl.utils.garbage import give_back, set_aside

# The same examples in every run, so that a failure is always of the change; `HYPOTHESIS_PROFILE=random` searches further.
settings.register_profile("same", derandomize=True)
settings.register_profile("random")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


class SetAside:
    """Keeps the search for garbage away from what stays, as the `axolotl` command does for its process.

    Importing the package and collecting the tests makes a million objects. A search through them takes a third of a second, and
    one training asks for several.
    """

    MANY_MODULES = 100

    def __init__(self) -> None:
        self.file: Path | None = None
        self.num_modules = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Iterator[None]:
        gc.disable()
        try:
            return (yield)
        finally:
            gc.enable()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Before the first test of a file, and after one that has imported much."""
        if item.path != self.file or len(sys.modules) > self.num_modules + self.MANY_MODULES:
            if item.path != self.file:
                # A fixture of a whole file may have run a command, which keeps what is logged from going on to pytest.
                logger = logging.getLogger("axolotl")
                logger.handlers[:], logger.propagate = [], True
                logger.setLevel(logging.NOTSET)
            self.file, self.num_modules = item.path, len(sys.modules)
            gc.collect()
            set_aside()

    def pytest_unconfigure(self) -> None:
        give_back()  # the bindings of triton report as leaked what is not collected at the end


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SetAside())


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command configures logging for its process, on streams that pytest closes when the test ends."""
    loggers = [logging.getLogger(), logging.getLogger("axolotl")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate
