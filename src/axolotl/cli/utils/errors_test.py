from __future__ import annotations

import errno

import click
import huggingface_hub.errors
import pytest
import torch

from axolotl.cli.utils.errors import INTERRUPTED, explain_error, report_error
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
