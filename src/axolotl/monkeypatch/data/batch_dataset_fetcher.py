"""Lets PyTorch's DataLoader fetch batches that are lists of bins of row numbers.

PyTorch takes a batch sampler's batch for a flat list of rows. A multipack batch is a list of bins; with the patch the collator
receives the rows bin by bin. Until when: as long as PyTorch's map fetcher does not take nested indices. Code that owns its
dataset can wrap it in `axolotl.utils.data.bins.BinDataset` instead and patch nothing.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import _utils
from torch.utils.data._utils import fetch, worker

_TORCH_FETCHER = fetch._MapDatasetFetcher
_TORCH_WORKER_LOOP = worker._worker_loop


class BinFetcher(_TORCH_FETCHER):
    """Fetches nested lists of row numbers; everything else as PyTorch does."""

    def fetch(self, possibly_batched_index: Any) -> Any:
        batch = possibly_batched_index
        if not (self.auto_collation and isinstance(batch, list) and any(isinstance(bin_, list) for bin_ in batch)):
            return super().fetch(batch)
        return self.collate_fn([self._rows(bin_) for bin_ in batch])

    def _rows(self, bin_: list[int]) -> list[Any]:
        if not bin_:
            return []
        if hasattr(self.dataset, "__getitems__") and self.dataset.__getitems__:
            return self.dataset.__getitems__(bin_)
        return [self.dataset[row] for row in bin_]


def patch_fetchers() -> None:
    """Put `BinFetcher` in the place from which the DataLoader takes its map fetcher. Safe to call twice."""
    fetch._MapDatasetFetcher = BinFetcher
    _utils.fetch._MapDatasetFetcher = BinFetcher


def patched_worker_loop(*args: Any, **kwargs: Any) -> Any:
    """PyTorch's worker loop, patched first: a spawned worker starts with unpatched modules."""
    patch_fetchers()
    return _TORCH_WORKER_LOOP(*args, **kwargs)


def apply_multipack_dataloader_patch() -> None:
    """Patch the fetcher here and in worker processes. Safe to call twice."""
    patch_fetchers()
    worker._worker_loop = patched_worker_loop
    _utils.worker._worker_loop = patched_worker_loop


def remove_multipack_dataloader_patch() -> None:
    """Put PyTorch's own parts back."""
    for module in (fetch, _utils.fetch):
        module._MapDatasetFetcher = _TORCH_FETCHER
    for module in (worker, _utils.worker):
        module._worker_loop = _TORCH_WORKER_LOOP
