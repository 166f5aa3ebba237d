"""Exact deduplication of tokenized rows."""

from __future__ import annotations

import hashlib

import numpy as np
from datasets import Dataset

from axolotl.utils.data.rows import select_rows


def drop_duplicates(dataset: Dataset, seen: set[bytes] | None = None) -> tuple[Dataset, int]:
    """Keep the first of rows with equal tokens and labels.

    Args:
        dataset: tokenized rows.
        seen: digests of rows that count as seen, such as those of the training set; grows by those of `dataset`.

    Returns:
        `(rows that stay, rows dropped)`.
    """
    seen = set() if seen is None else seen
    keep = np.ones(len(dataset), dtype=bool)
    for row, digest in enumerate(_digests(dataset)):
        keep[row] = digest not in seen
        seen.add(digest)
    return select_rows(dataset, keep), int((~keep).sum())


def _digests(dataset: Dataset):
    columns = dataset.select_columns(["input_ids", "labels"]).with_format("numpy")
    for batch in columns.iter(batch_size=1000):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            digest = hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes())
            digest.update(b"|")
            digest.update(np.asarray(labels, dtype=np.int64).tobytes())
            yield digest.digest()[:16]
