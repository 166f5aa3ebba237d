from __future__ import annotations

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader
from torch.utils.data._utils import fetch

from axolotl.monkeypatch.data.batch_dataset_fetcher import (
    apply_multipack_dataloader_patch,
    remove_multipack_dataloader_patch,
)
from axolotl.utils.data.bins import BinDataset

BATCHES = [[[3, 1], [0]], [[2]], [[]]]
EXPECTED = [[[{"n": 3}, {"n": 1}], [{"n": 0}]], [[{"n": 2}]], [[]]]


@pytest.fixture
def patched():
    apply_multipack_dataloader_patch()
    apply_multipack_dataloader_patch()
    yield
    remove_multipack_dataloader_patch()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: list(rows)])
def test_bins_are_fetched(patched, num_workers, wrap):
    rows = wrap(Dataset.from_dict({"n": [0, 1, 2, 3]}))
    loader = DataLoader(rows, batch_sampler=BATCHES, collate_fn=list, num_workers=num_workers)
    assert list(loader) == EXPECTED
    flat = DataLoader(rows, batch_size=2, collate_fn=list, num_workers=num_workers)
    assert list(flat) == [[{"n": 0}, {"n": 1}], [{"n": 2}, {"n": 3}]]


def test_the_patch_can_be_taken_back():
    original = fetch._MapDatasetFetcher
    apply_multipack_dataloader_patch()
    assert fetch._MapDatasetFetcher is not original
    remove_multipack_dataloader_patch()
    assert fetch._MapDatasetFetcher is original


@pytest.mark.parametrize("num_workers", [0, 1])
def test_without_a_patch(num_workers):
    rows = BinDataset(Dataset.from_dict({"n": [0, 1, 2, 3]}))
    assert list(DataLoader(rows, batch_sampler=BATCHES, collate_fn=list, num_workers=num_workers)) == EXPECTED
    assert list(DataLoader(rows, batch_size=4, collate_fn=list)) == [[{"n": 0}, {"n": 1}, {"n": 2}, {"n": 3}]]
