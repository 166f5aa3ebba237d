"""Copies in host memory: independent of their sources, of the same structure, and in memory that is used again."""

from __future__ import annotations

import threading

import safetensors.torch
import torch
import transformers.modeling_utils

from axolotl.core import host_copy
from axolotl.core.host_copy import CapturedFile, HostMemory, captured_files, count_bytes


def write_all(files: list[CapturedFile]) -> None:
    for file in files:
        file.write(file.path)


def test_what_changes_after_the_capture_is_not_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(host_copy, "SMALL_BYTES", 0)
    shared = torch.arange(4.0)
    part = torch.arange(12.0).reshape(3, 4)[:, 1:3]
    state = {"a": shared, "again": [shared], "part": part, "group": {"lr": 0.1, "betas": (0.9, 0.99)}, "none": None}
    weights = {"w": torch.ones(2, 3, dtype=torch.bfloat16), "empty": torch.empty(0, 2), "scalar": torch.tensor(7)}
    torch.save(state, tmp_path / "before.pt")
    safetensors.torch.save_file(weights, tmp_path / "before.safetensors")
    (tmp_path / "later").mkdir()
    with captured_files(HostMemory()) as files:
        torch.save(state, tmp_path / "later/before.pt")
        transformers.modeling_utils.safe_save_file(weights, tmp_path / "later/before.safetensors", metadata=None)
        assert not list((tmp_path / "later").iterdir())
    shared.zero_()
    part.zero_()
    weights["w"].zero_()
    state["group"]["lr"] = 9
    write_all(files)
    for name in ("before.pt", "before.safetensors"):
        assert (tmp_path / "later" / name).read_bytes() == (tmp_path / name).read_bytes()
    loaded = torch.load(tmp_path / "later/before.pt", weights_only=True)
    assert loaded["a"].data_ptr() == loaded["again"][0].data_ptr()


def test_other_threads_and_small_files_go_to_the_disk(tmp_path):
    def save():
        torch.save(torch.zeros(2**19), tmp_path / "thread.pt")

    original = torch.save
    with captured_files(HostMemory()) as files:
        torch.save({"step": 3}, tmp_path / "small.pt")
        thread = threading.Thread(target=save)
        thread.start()
        thread.join()
        torch.save(torch.zeros(2**19), tmp_path / "large.pt")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["small.pt", "thread.pt"]
    assert torch.save is original
    assert [file.path.name for file in files] == ["large.pt"]


def test_memory_is_used_again():
    memory = HostMemory()
    for _ in range(3):
        memory.reset()
        taken = [memory.take(size, pinned=False) for size in (10, 1000, 2**20)]
        assert [part.untyped_storage().nbytes() for part in taken] == [10, 1000, 2**20]
        for number, part in enumerate(taken):
            part.fill_(number)
        assert [int(part.sum()) for part in taken] == [0, 1000, 2 * 2**20]
        assert memory.reserved_bytes == host_copy.BLOCK_BYTES


def test_shared_memory_counts_once():
    weight = torch.zeros(100)
    assert count_bytes({"a": weight, "b": [weight, weight[:3]], "c": 1}) == 400
