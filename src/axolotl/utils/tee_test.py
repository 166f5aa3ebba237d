from __future__ import annotations

import logging
import sys

from axolotl.utils.tee import start_tee, stop_tee


def test_records_and_output_are_copied_until_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AXOLOTL_TEE_STDOUT", "1")
    first, second = tmp_path / "a/debug.log", tmp_path / "b/debug.log"
    start_tee(first)
    logging.getLogger("axolotl.x").warning("one record")
    print("one line")
    start_tee(second)
    print("another line")
    stop_tee()
    print("after the end")
    logging.getLogger("axolotl.x").warning("a late record")
    assert "one record\n" in first.read_text()
    assert "one line\n" in first.read_text()
    assert second.read_text() == "another line\n"
    assert capsys.readouterr().out == "one line\nanother line\nafter the end\n"
    assert sys.stdout.isatty() is False


def test_a_second_run_keeps_what_the_first_said(tmp_path, monkeypatch):
    monkeypatch.delenv("AXOLOTL_TEE_STDOUT", raising=False)
    for text in ("first run", "second run"):
        start_tee(tmp_path / "debug.log")
        logging.getLogger("axolotl.x").warning(text)
        stop_tee()
    assert [line.rpartition("] ")[2] for line in (tmp_path / "debug.log").read_text().splitlines()] == [
        "first run",
        "second run",
    ]
