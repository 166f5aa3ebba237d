"""Signals to a process reach the command that it runs, which is waited for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from axolotl.run.children import run_child

PARENT = """
import signal, sys
from axolotl.run import children
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)  # whoever runs the tests in the background may ignore it
children.LAST_SECONDS = 0.5
sys.exit(children.run_child([sys.executable, *sys.argv[1:]]))
"""

# Saves for longer than the same wish lasts; a second signal after that ends it at once.
SAVES = """
import os, signal, sys, time
first = []

def handle(number, frame):
    if first and time.monotonic() - first[0] > 1:
        os._exit(128 + number)
    first.append(time.monotonic())
    open("asked", "w").close()

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, handle)
open("pid", "w").write(str(os.getpid()))
while not first:
    time.sleep(0.05)
time.sleep(float(sys.argv[1]))
open("saved", "w").close()
sys.exit(128 + signal.SIGTERM)
"""

DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda number, frame: open("asked", "w").close())
open("pid", "w").write(str(os.getpid()))
while True:
    time.sleep(600)
"""

# As `accelerate launch` of one process: it does not handle signals, and leaves its process behind.
LAUNCHES = """
import subprocess, sys
subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()
"""


def is_running(pid: int) -> bool:
    """Whether a process is there, and no mere entry of one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(path: Path) -> str:
    end = time.monotonic() + 240
    while not path.exists() or (path.name == "pid" and not path.read_text()):
        assert time.monotonic() < end, path
        time.sleep(0.02)
    return path.read_text()


@pytest.fixture
def begin(tmp_path):
    """Starts a process that runs a command as a child; what is left of both is killed in the end."""
    started: list[subprocess.Popen] = []

    def start(*arguments: str) -> subprocess.Popen:
        for name, text in (("saves.py", SAVES), ("deaf.py", DEAF), ("launches.py", LAUNCHES)):
            (tmp_path / name).write_text(text)
        started.append(subprocess.Popen([sys.executable, "-c", PARENT, *arguments], cwd=tmp_path))
        wait_for(tmp_path / "pid")
        return started[0]

    yield start
    started[0].kill()
    started[0].wait()
    with contextlib.suppress(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=str)
@pytest.mark.parametrize("launched", [(), ("launches.py",)], ids=["itself", "by a launcher that does not wait"])
@needs_proc
def test_a_signal_is_passed_on_and_the_child_waited_for(begin, tmp_path, number, launched):
    parent = begin(*launched, "saves.py", "1.5")
    parent.send_signal(number)
    assert parent.wait(120) == 128 + number
    assert (tmp_path / "saved").exists()
    assert not is_running(int((tmp_path / "pid").read_text()))


@needs_proc
def test_the_second_signal_is_passed_on(begin, tmp_path):
    parent = begin("saves.py", "600")
    parent.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "asked")
    time.sleep(1.2)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(120) == 128 + signal.SIGTERM
    assert not (tmp_path / "saved").exists()
    assert not is_running(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("launched", [(), ("launches.py",)], ids=["itself", "by a launcher that does not wait"])
@needs_proc
def test_the_second_signal_ends_what_does_not_listen(begin, tmp_path, launched):
    parent = begin(*launched, "deaf.py")
    parent.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "asked")
    time.sleep(1.2)
    assert parent.poll() is None
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(120) == 128 + signal.SIGTERM
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_without_a_signal_it_is_the_exit_code_of_the_child():
    before = signal.getsignal(signal.SIGTERM)
    assert run_child([sys.executable, "-c", "import sys; sys.exit(3)"]) == 3
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) is before
