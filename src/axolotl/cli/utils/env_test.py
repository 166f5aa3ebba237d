from __future__ import annotations

import os

import pytest

from axolotl.cli.utils.env import prepare_environment, read_env_file


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("HF_", "PYTORCH_", "TORCH_", "TRANSFORMERS_", "HUGGINGFACE_", "BASE_VOLUME", "T_")):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


def test_env_file(tmp_path, monkeypatch):
    monkeypatch.setenv("T_SET", "kept")
    path = tmp_path / ".env"
    path.write_text(
        "# comment\nT_A=1\nexport T_B = two words # note\nT_C='quoted # not a note' # note\nT_D=\"x=y\"\nT_E=\n"
        "T_SET=lost\nno equals\n1BAD=x\nT_F=a#b\n"
    )
    read_env_file(path)
    found = {name: os.environ.get(name) for name in ("T_A", "T_B", "T_C", "T_D", "T_E", "T_F", "T_SET")}
    assert found == {
        "T_A": "1",
        "T_B": "two words",
        "T_C": "quoted # not a note",
        "T_D": "x=y",
        "T_E": "",
        "T_F": "a#b",
        "T_SET": "kept",
    }


def test_what_is_no_env_file_is_passed_over(tmp_path):
    read_env_file(tmp_path / "none")
    read_env_file(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe=1")
    read_env_file(tmp_path / "binary")


def test_old_names_are_carried_over(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_CACHE", "/cache")
    monkeypatch.setenv("TORCH_CUDA_ALLOC_CONF", "backend:native")
    monkeypatch.setenv("BASE_VOLUME", str(tmp_path))
    prepare_environment()
    assert os.environ["HF_HUB_CACHE"] == "/cache"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "backend:native"
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert "HF_HOME" not in os.environ


def test_caches_go_to_the_base_volume(tmp_path, monkeypatch):
    monkeypatch.setenv("BASE_VOLUME", str(tmp_path))
    prepare_environment()
    assert os.environ["HF_HOME"] == str(tmp_path / "huggingface-cache")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
