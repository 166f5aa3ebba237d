from __future__ import annotations

import io
import logging
import sys

import pytest

from axolotl.exceptions import OutputError
from axolotl.utils.dict import DictDefault
from axolotl.utils.tee import close_debug_log, prepare_debug_log


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    monkeypatch.delenv("AXOLOTL_TEE_STDOUT", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    yield
    close_debug_log()


def test_both_streams_and_logging_are_copied_without_colours(tmp_path, capsys):
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("tee_test")
    logger.addHandler(handler)
    logger.propagate = False
    before = (sys.stdout, sys.stderr)
    path = prepare_debug_log(DictDefault(output_dir=str(tmp_path / "out")))
    print("\033[32mto out\033[0m")
    print("to err", file=sys.stderr)
    logger.warning("to the log")
    close_debug_log()
    print("afterwards")
    logger.warning("afterwards too")
    logger.removeHandler(handler)
    assert (tmp_path / "out" / "debug.log").read_text() == "to out\nto err\nto the log\n"
    assert path == str(tmp_path / "out" / "debug.log")
    assert (sys.stdout, sys.stderr) == before and handler.stream is before[1]
    assert "\033[32mto out" in capsys.readouterr().out


def test_streams_that_were_closed_meanwhile_do_no_harm(tmp_path, monkeypatch):
    """As in a notebook or a test, whose output is captured cell by cell."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    prepare_debug_log(DictDefault(output_dir=str(tmp_path)))
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("tee_test")
    logger.addHandler(handler)
    captured = sys.stderr._stream
    captured.close()
    close_debug_log()
    logger.removeHandler(handler)
    assert handler.stream is captured


def test_a_later_run_in_the_same_folder_goes_on_in_the_same_log(tmp_path):
    for text, expected in (("train", "train\n"), ("evaluate", "train\nevaluate\n")):
        prepare_debug_log(DictDefault(output_dir=str(tmp_path)))
        print(text)
        close_debug_log()
        assert (tmp_path / "debug.log").read_text() == expected


@pytest.mark.parametrize("environment", [{"AXOLOTL_TEE_STDOUT": "0"}, {"LOCAL_RANK": "1"}])
def test_off_and_other_ranks(tmp_path, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert prepare_debug_log(DictDefault(output_dir=str(tmp_path))) is None
    assert not (tmp_path / "debug.log").exists()


def test_an_output_dir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"`output_dir: .*file/out` cannot be written: .*file is a file"):
        prepare_debug_log(DictDefault(output_dir=str(tmp_path / "file" / "out")))
    assert not hasattr(sys.stdout, "_file")
