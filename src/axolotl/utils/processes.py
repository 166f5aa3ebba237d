"""Processes that end with the one that started them, however that one ends.

A process that is killed, or that a signal ends, cannot tell its children. They would go on, hold memory and devices, and keep
alive what `multiprocessing` starts beside them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# Ctrl-C, a scheduler's wish to end, a lost terminal, and what Slurm sends before the time limit (`--signal=USR1@60`).
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
STOP_SIGNALS = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)
SAME_WISH_SECONDS = 1.0  # a launcher passes on what a terminal or scheduler has already sent to all

LAUNCHER_PID = "AXOLOTL_LAUNCHER_PID"  # variable: the process that starts commands of this package
LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun", "accelerate.commands.launch", "torch.distributed.run"}
LOOK_SECONDS = 0.2  # well within the same wish


def end_with_parent() -> None:
    """Let this process, which `multiprocessing` started, end at once when the one that asked for it is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def stop_with_launcher() -> None:
    """Let this process end as by SIGTERM, which saves what was trained, when the launcher that started it is gone.

    Without a launcher nobody is watched: a shell may end before what it started.
    """
    launcher = os.getppid()
    if os.environ.get(LAUNCHER_PID) != str(launcher) and not _is_launcher(launcher):
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stop-with-launcher", daemon=True).start()


def _is_launcher(pid: int) -> bool:
    """Whether the command line of a process is that of a launcher; no where there is no `/proc`."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    return any(word.rpartition("/")[2] in LAUNCHERS for word in command[:4])


def leave_signals_to_parent() -> None:
    """Let this process, which `multiprocessing` started, end by a stop signal only if its parent sends it.

    Terminals and schedulers send them to every process of a run, and without its workers a run could not end the step under way.
    Where the system does not tell who sent a signal (macOS), nothing changes.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):
        return
    # In this thread, and in every one that starts from here on. What libraries have started before, where a worker is not a fork,
    # takes signals as ever: handlers do not learn the sender, and a worker that its parent cannot end would be worse.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    _start_programs_unblocked()

    def watch() -> None:
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != parent.pid:
            pass
        os._exit(1)

    threading.Thread(target=watch, name="leave-signals-to-parent", daemon=True).start()


def _start_programs_unblocked() -> None:
    """A program inherits what its starter blocks; it could not be ended by `terminate` then."""
    execute: Any = subprocess.Popen._execute_child  # pyright: ignore[reportAttributeAccessIssue]

    def execute_unblocked(self: subprocess.Popen, *args: Any, **kwargs: Any) -> None:
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            execute(self, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    subprocess.Popen._execute_child = execute_unblocked  # pyright: ignore[reportAttributeAccessIssue]


def init_worker(worker_id: int, then: Callable[[int], None] | None = None) -> None:
    """`worker_init_fn` of a DataLoader: its worker ends with its parent, and not before.

    torch's own watch looks at the parent's number, which with `forkserver` is that of a server that lives as long as its workers.

    Args:
        worker_id: the worker's number.
        then: what else to call with it.
    """
    leave_signals_to_parent()
    end_with_parent()
    _mind_no_hanging_up()
    if then is not None:
        then(worker_id)


def _mind_no_hanging_up() -> None:
    """A parent that is interrupted while a tensor is handed to it hangs up; `multiprocessing` would show that as an error here."""
    show = sys.excepthook

    def show_others(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        if not isinstance(error, (ConnectionError, EOFError)):
            show(kind, error, trace)

    sys.excepthook = show_others
