"""Commands in processes of their own: a signal to this process reaches them, and they are waited for.

Whoever stops a run knows this process only. Left alone, its child would go on and hold its GPUs; killed, it could not save.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
import types
from collections.abc import Mapping, Sequence

import psutil

from axolotl.utils.logging import get_logger
from axolotl.utils.processes import LAUNCHER_PID, SAME_WISH_SECONDS, STOP_SIGNALS

LOG = get_logger(__name__)

LAST_SECONDS = 10.0  # from the second signal to the end of what does not listen


def run_child(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> int:
    """Run a command and wait for it.

    Signals of `STOP_SIGNALS` to this process are passed on. The first lets the child save for as long as it takes; the next,
    a second later or more, ends it: it is passed on, too, and `LAST_SECONDS` later what is left is killed.

    Args:
        command: program and arguments.
        env: variables; those of this process when None.

    Returns:
        Its exit code, negative for the signal that ended it.

    Raises:
        SystemExit: this process was signalled, with 128 plus the signal's number; the child is gone.
    """
    relay = _Relay()
    with relay.listening():
        relay.start(command, {**(os.environ if env is None else env), LAUNCHER_PID: str(os.getpid())})
        code = relay.wait()
    if relay.number is not None:
        raise SystemExit(128 + relay.number)
    return code


class _Relay:
    """Passes signals of this process on to a child."""

    def __init__(self) -> None:
        self.number: int | None = None  # the first signal
        self._first_at = 0.0
        self._child: subprocess.Popen | None = None
        self._workers: list[psutil.Process] = []  # what the child had started when the signal came

    @contextlib.contextmanager
    def listening(self):
        """Have the signals handled here. An ignored one stays ignored: `nohup` ignores SIGHUP."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            before = {number: signal.signal(number, self._handle) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._child = subprocess.Popen(command, env=env)
        if self.number is not None:  # it came while the process was being made
            self._child.send_signal(self.number)

    def wait(self) -> int:
        assert self._child is not None
        code = self._child.wait()
        if self.number is not None:
            # Some launchers, as `accelerate launch` of a single process, end at once and leave theirs behind.
            self._tell_workers(self.number)
            psutil.wait_procs(self._workers)
        return code

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        child = self._child
        if self.number is None:
            self.number, self._first_at = number, time.monotonic()
            name = signal.Signals(number).name
            LOG.warning(f"{name}: passed on; waiting until what runs has saved and ended. Once more to end it at once.")
            if child is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._workers = psutil.Process(child.pid).children()
        elif time.monotonic() - self._first_at > SAME_WISH_SECONDS:
            timer = threading.Timer(LAST_SECONDS, self._kill)
            timer.daemon = True
            timer.start()
            if child is not None and child.returncode is not None:
                self._tell_workers(number)
        if child is not None:
            child.send_signal(number)

    def _tell_workers(self, number: int) -> None:
        for worker in self._workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(number)

    def _kill(self) -> None:
        self._tell_workers(signal.SIGKILL)
        if self._child is not None:
            self._child.kill()
