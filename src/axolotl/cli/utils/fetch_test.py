from __future__ import annotations

import json
import socket

import pytest

from axolotl.cli.utils import fetch
from axolotl.cli.utils.fetch import fetch_from_github, shipped_folder
from axolotl.exceptions import ConfigError


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("fetch must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_examples_arrive_whole(tmp_path):
    report = fetch_from_github("examples/", str(tmp_path / "here"))
    assert (tmp_path / "here/llama-3/lora-1b.yml").read_bytes() == (
        shipped_folder("examples") / "llama-3/lora-1b.yml"
    ).read_bytes()
    assert len(report.written) >= 12
    again = fetch_from_github("examples/", str(tmp_path / "here"))
    assert again.written == again.kept == []
    assert again.unchanged == report.written


def test_default_folder_has_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fetch_from_github("deepspeed_configs/")
    stage = json.loads((tmp_path / "deepspeed_configs/zero2.json").read_text())["zero_optimization"]["stage"]
    assert stage == 2


def test_a_changed_file_is_kept_and_an_outdated_one_replaced(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "a.yml").write_text("one")
    (shipped / "b.yml").write_text("one")
    monkeypatch.setattr(fetch, "shipped_folder", lambda name: shipped)
    dest = tmp_path / "dest"
    fetch_from_github("examples/", str(dest))
    (dest / "a.yml").write_text("mine")
    for name in ("a.yml", "b.yml"):
        (shipped / name).write_text("two")
    report = fetch_from_github("examples/", str(dest))
    assert report.kept == ["a.yml"]
    assert report.written == ["b.yml"]
    assert (dest / "a.yml").read_text() == "mine"
    assert (dest / "a.yml.new").read_text() == "two"
    assert (dest / "b.yml").read_text() == "two"


@pytest.mark.parametrize("name", ["src", "examples/../src", "nothing", ""])
def test_only_what_is_shipped(name):
    with pytest.raises(ConfigError, match="Nothing is shipped"):
        fetch_from_github(name)
