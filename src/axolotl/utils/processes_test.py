"""Processes that are started on the way end with the one that started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.resource_sharer import DupFd
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from axolotl.core.datasets.map_rows import can_fork
from axolotl.utils.processes import init_worker

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes cannot be forked on this system")

# Each tells, in the file that it is given, the numbers of the processes that it starts.
TELLS = """
import os, sys, time

def tell():
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.getpid()}\\n")

"""

TOKENIZES = """
from datasets import Dataset
from axolotl.core.datasets.map_rows import BLOCK_ROWS, map_rows

def convert(rows, numbers):
    tell()
    time.sleep(600)
    return rows

map_rows(Dataset.from_dict({"number": list(range(2 * BLOCK_ROWS))}), convert, num_proc=2)
"""

FILTERS = """
from datasets import Dataset
from axolotl.datasets import TokenizedPromptDataset
from axolotl.prompt_tokenizers import PromptTokenizingStrategy

def keeps(row):
    tell()
    time.sleep(600)

class Strategy(PromptTokenizingStrategy):
    filter_rows = staticmethod(keeps)

    def tokenize_prompt(self, prompt):
        return prompt

TokenizedPromptDataset(Strategy(None, None), Dataset.from_dict({"number": list(range(2000))}), process_count=2)
"""


RANKS = """
from pathlib import Path
from tests.integration.training_runs import run_on_ranks

def sleep(folder):
    tell()
    time.sleep(600)

if __name__ == "__main__":
    run_on_ranks(sleep, Path(sys.argv[1]).parent / "ranks")
"""


WORKERS = """
from datasets import Dataset
from axolotl.utils.data.stream import BlockPlan, TokenStream
from axolotl.utils.data.stream_loader import StreamLoader
from axolotl.utils.data.stream_mix import StreamMix
from axolotl.utils.data.stream_rows import RowPolicy
from axolotl.utils.data.stream_sources import StreamSource

def collate(rows):
    tell()
    return {}

if __name__ == "__main__":
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}] * 8)
    mix = StreamMix([StreamSource(rows.to_iterable_dataset(), "d", seed=1)])
    stream = TokenStream(mix, [None], RowPolicy(sequence_len=8), BlockPlan(num_rows=2))
    batches = iter(StreamLoader(stream, collate, num_workers=2, multiprocessing_context="forkserver"))
    next(batches)
    time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Whether a process is there, and no mere entry of one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def session_of(pid: int) -> list[int]:
    """The running processes of the session that a process leads."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == pid and is_running(int(entry.name)):
                found.append(int(entry.name))
        except ProcessLookupError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize(
    ("script", "number"),
    [
        (TOKENIZES, signal.SIGKILL),
        (TOKENIZES, signal.SIGTERM),
        (FILTERS, signal.SIGKILL),
        (WORKERS, signal.SIGKILL),
        (RANKS, signal.SIGKILL),
    ],
    ids=[
        "tokenizing, killed",
        "tokenizing, terminated",
        "filtering, killed",
        "loading, killed",
        "ranks of a test, killed",
    ],
)
def test_nothing_is_left_of_a_process_that_is_killed(script, number, tmp_path):
    (tmp_path / "script.py").write_text(TELLS + script)
    told, output = tmp_path / "told.txt", tmp_path / "output.txt"
    with output.open("w") as out:
        command = [sys.executable, tmp_path / "script.py", told]
        parent = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        children: set[int] = set()
        while len(children) < 2:
            assert parent.poll() is None, f"ended with {parent.returncode}\n{output.read_text()}"
            time.sleep(0.02)
            children = {int(line) for line in told.read_text().splitlines()} if told.exists() else set()
        assert children <= set(session_of(parent.pid))
        parent.send_signal(number)
        assert parent.wait(120) == -number
        deadline = time.monotonic() + 120
        while (left := session_of(parent.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
    finally:
        parent.kill()
        for pid in session_of(parent.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not tell who sent a signal")
@pytest.mark.parametrize("context", ["fork", "forkserver"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_outlives_a_signal_that_was_sent_to_all(context, number):
    loader = DataLoader(
        list(range(40)),
        num_workers=1,
        prefetch_factor=1,
        batch_size=None,
        worker_init_fn=init_worker,
        multiprocessing_context=context,
    )
    batches = iter(loader)
    seen = [next(batches)]
    (worker,) = batches._workers
    subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    time.sleep(0.2)
    seen.extend(batches)
    assert seen == list(range(40))

    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    with pytest.raises(RuntimeError, match="worker"):  # as soon as it is gone, wherever this process is then
        os.kill(worker.pid, number)
        worker.join(120)
        list(batches)
    assert not worker.is_alive()


def _offer_a_file(sender):
    init_worker(0)
    sender.send(DupFd(1)._id)
    time.sleep(60)


def test_a_parent_that_hangs_up_is_no_error_of_a_worker(capfd):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_offer_a_file, args=(sender,))
    worker.start()
    address, _ = receiver.recv()
    with socket.socket(socket.AF_UNIX) as parent:
        parent.connect(address)
    time.sleep(0.3)
    assert worker.is_alive()
    worker.kill()
    worker.join()
    assert "Traceback" not in capfd.readouterr().err


def _end_a_program(sender):
    init_worker(0)
    program = subprocess.Popen(["sleep", "60"])
    program.terminate()
    sender.send(program.wait(50))


def test_a_worker_can_end_the_programs_that_it_starts():
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_end_a_program, args=(sender,))
    worker.start()
    assert receiver.recv() == -signal.SIGTERM
    worker.join()
