"""What importing makes is set aside in a process of our own, and only there."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from axolotl.utils.garbage import (
    collecting_only_new,
    give_back,
    importing,
    set_aside,
    without_garbage_collection,
)


def test_a_program_that_imports_us_gets_its_garbage_collected():
    give_back()  # such a program has nothing set aside, as these tests have
    with importing():
        assert not gc.isenabled()
    with collecting_only_new():
        assert gc.isenabled() and gc.get_freeze_count() > 0
    assert gc.isenabled() and gc.get_freeze_count() == 0


@pytest.mark.parametrize("freeze", [set_aside, gc.freeze], ids=["by us", "by the program"])
def test_what_was_set_aside_before_is_not_given_back(freeze):
    give_back()
    freeze()
    try:
        before = gc.get_freeze_count()
        with collecting_only_new(), collecting_only_new(after_setup=True):
            pass
        assert gc.get_freeze_count() > 0.99 * before > 0  # what ends of itself meanwhile is no longer counted
    finally:
        give_back()


def test_collecting_stays_off_where_it_was_off():
    gc.disable()
    try:
        with without_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_in_our_own_process_what_is_imported_stays_until_it_ends():
    script = """
import gc, sys
from axolotl.utils.garbage import collecting_only_new, importing, own_process
own_process()
with importing():
    kept = [[] for _ in range(1000)]
frozen = gc.get_freeze_count()
assert frozen >= 1000 and gc.isenabled()
with collecting_only_new():
    pass
assert gc.get_freeze_count() == frozen  # not given back
made = [[] for _ in range(1000)]
with collecting_only_new(after_setup=True):
    assert gc.get_freeze_count() >= frozen + 1000
assert gc.get_freeze_count() == 0  # what was made may be let go
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def run(script: str) -> subprocess.CompletedProcess[str]:
    start = "import atexit, sys, threading\nfrom axolotl.utils.garbage import end_process\n"
    return subprocess.run([sys.executable, "-c", start + script], capture_output=True, text=True)


def test_what_waits_for_the_end_of_a_process_is_done():
    script = """
class Taken:
    def __del__(self):
        print("taken apart")
kept = Taken()
atexit.register(print, "handler")
sys.stdout.write("written, ")
end_process(3)
"""
    ended = run(script)
    assert (ended.returncode, ended.stdout) == (3, "written, handler\n")


def test_a_thread_at_work_is_waited_for():
    script = """
thread = threading.Timer(0.3, print, ["thread"])
thread.start()
atexit.register(print, "handler")
end_process(0)
"""
    ended = run(script)
    assert (ended.returncode, ended.stdout) == (0, "thread\nhandler\n")
