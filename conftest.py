"""One thread a process, so that sums of floats are added up in one order everywhere, and no network.

Every process of the tests imports this checkout, also where the package is installed as a copy of it.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# For the processes that this one starts; for itself it is `pythonpath` of pyproject.toml.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        str(Path(__file__).resolve().parent / "src"),
        str(Path(__file__).resolve().parent),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "localhost,127.0.0.1"  # servers of tests

import pytest
from hypothesis import HealthCheck, settings

from axolotl.utils.garbage import give_back, set_aside
from axolotl.utils.processes import STOP_SIGNALS

# The same examples in every run, so that a failure is always of the change; `HYPOTHESIS_PROFILE=random` searches further.
# How long one takes says more of the machine than of the code.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """A command sets variables and handlers of signals for its process. The next test finds, and its children inherit, none."""
    environment, handlers = dict(os.environ), {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
