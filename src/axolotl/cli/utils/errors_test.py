from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import click
import huggingface_hub.errors
import pytest
import torch

from axolotl.cli.utils.errors import INTERRUPTED, Terminated, explain_error, report_error
from axolotl.exceptions import ConfigError, DatasetError


def raised(function) -> BaseException:
    with pytest.raises(BaseException) as error:
        function()
    return error.value


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConfigError("only one"), "Error: only one"),
        (ConfigError(["first", "second"]), "1. first\n  2. second"),
        (ConfigError(map(str, range(5000))), "5,000 problems"),
        (ConfigError(map(str, range(5000))), "... and 4,960 more."),
        (DatasetError("row 3"), "Error: row 3"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "`micro_batch_size`"),
        (MemoryError(), "main memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/model"), "no space left on the disk: /out/model"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), "permission denied: /out"),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline"), "local path"),
        (huggingface_hub.errors.LocalEntryNotFoundError("not there"), "local path"),
        (KeyboardInterrupt(), "Interrupted."),
    ],
)
def test_errors_in_words(error, words):
    text = explain_error(error)
    assert words in text
    assert len(text.splitlines()) <= (42 if isinstance(error, ConfigError) else 4)


def test_the_cause_of_a_wrapped_hub_error_is_found():
    def load():
        try:
            raise huggingface_hub.errors.OfflineModeIsEnabled("offline")
        except huggingface_hub.errors.OfflineModeIsEnabled as error:
            raise OSError("We couldn't connect to 'https://huggingface.co'") from error

    assert "cannot be reached" in explain_error(raised(load))


def test_an_unexpected_error_names_its_place(capsys, monkeypatch):
    monkeypatch.delenv("AXOLOTL_DEBUG", raising=False)
    from axolotl.cli.utils.env import read_env_file

    error = raised(lambda: read_env_file(None))
    assert report_error(error) == 1
    err = capsys.readouterr().err
    assert "AttributeError: 'NoneType' object has no attribute 'read_text'" in err
    assert "env.py:" in err
    assert "AXOLOTL_DEBUG=1" in err
    assert "Traceback" not in err
    monkeypatch.setenv("AXOLOTL_DEBUG", "1")
    report_error(error)
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_that_an_import_swallowed():
    def load():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module 'LlamaConfig'") from error

    assert explain_error(raised(load)) == "Interrupted."


def test_a_file_that_ends_early_is_no_interrupt(capsys):
    @click.command()
    def command():
        raise EOFError("the file ends early")

    assert report_error(raised(lambda: command.main([], standalone_mode=False))) == 1
    assert "the file ends early" in capsys.readouterr().err


def test_exit_codes_and_ranks(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert report_error(KeyboardInterrupt()) == INTERRUPTED
    assert capsys.readouterr().err == "[rank 1] Interrupted.\n"


COMMAND = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run below `nohup`, which ignores it
from axolotl.cli.utils import errors
from axolotl.cli.utils.errors import end_cleanly_on_signals, leave, report_error
errors.SAME_WISH_SECONDS = 60  # a machine at work may let more than one second pass between two signals
from axolotl.utils.garbage import end_process, own_process

def clean_up():
    print("cleaning", flush=True)
    time.sleep(0.3)
    print("clean", flush=True)

own_process()
end_cleanly_on_signals()
try:
    {body}
except KeyboardInterrupt as error:
    code = report_error(error)
    leave()
    end_process(code)
"""

IMPORTS = """
    try:
        import slow
    except BaseException:
        slow = None  # as where a package is missing
"""

FINALIZES = """
    class Slow:
        def __del__(self):
            print("ready", flush=True)
            time.sleep(0.5)

    Slow()
    time.sleep(60)
"""

WORKS = """
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        clean_up()
"""


def start_command(folder: Path, body: str) -> subprocess.Popen:
    (folder / "slow.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    (folder / "command.py").write_text(COMMAND.format(body=body.strip()))
    process = subprocess.Popen(
        [sys.executable, "command.py"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("body", "number"),
    [(IMPORTS, signal.SIGINT), (IMPORTS, signal.SIGHUP), (FINALIZES, signal.SIGTERM)],
    ids=["import, SIGINT", "import, SIGHUP", "finalizer, SIGTERM"],
)
def test_a_signal_is_not_lost_where_exceptions_are(body, number, tmp_path):
    process = start_command(tmp_path, body)
    process.send_signal(number)
    assert process.communicate(timeout=120) == ("", "Interrupted.\n")
    assert process.returncode == 128 + number


def test_a_signal_that_is_passed_on_does_not_disturb_the_cleaning_up(tmp_path):
    process = start_command(tmp_path, WORKS)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120) == ("clean\n", "Interrupted.\n")
    assert process.returncode == 128 + signal.SIGINT


def test_the_exit_code_tells_the_signal():
    assert report_error(Terminated(signal.SIGHUP)) == 128 + signal.SIGHUP
