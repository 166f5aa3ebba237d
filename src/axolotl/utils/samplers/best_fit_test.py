"""Plans hold every document once and no bin too much, however the lengths are distributed; and they are tight."""

from __future__ import annotations

import numpy as np
import pytest

from axolotl.utils.samplers.best_fit import deal, pack_best_fit, stable_order

NUM = 24_000  # enough to place the longer half in rounds

MIXES = {
    "all different": (lambda rng: rng.permutation(NUM) + 1, 131_072, 0.998),
    "long documents": (lambda rng: np.clip(rng.lognormal(8.5, 1.2, NUM).astype(int) + 2, 2, 131_072), 131_072, 0.995),
    "chat": (lambda rng: np.clip(rng.lognormal(5.5, 1.0, NUM).astype(int) + 2, 2, 4096), 4096, 0.998),
    "uniform": (lambda rng: rng.integers(2, 8193, NUM), 8192, 0.985),
    "pairs at best": (lambda rng: rng.integers(30_000, 65_537, NUM), 131_072, 0.70),
    "one to a bin": (lambda rng: rng.integers(66_000, 131_073, NUM), 131_072, 0.75),
    "all alike": (lambda rng: np.full(NUM, 700), 4096, 0.85),
    "tiny": (lambda rng: rng.integers(1, 4, NUM), 4096, 0.09),  # 200 documents fill a bin
}


@pytest.mark.parametrize("mix", MIXES)
def test_every_document_once_in_bins_that_hold_them(mix):
    lengths_of, capacity, least = MIXES[mix]
    lengths = lengths_of(np.random.default_rng(0)).astype(np.int64)
    plan = pack_best_fit(lengths, capacity, 200)
    sums = np.add.reduceat(plan.lengths, plan.offsets[:-1])
    assert np.array_equal(np.sort(plan.lengths), np.sort(lengths))
    assert sums.max() <= capacity and np.diff(plan.offsets).max() <= 200 and np.diff(plan.offsets).min() >= 1
    # What no plan can do without: room for the tokens, for as many documents as a bin takes, and a bin for each document of more than half a bin.
    at_most = min(200, capacity // int(lengths.min()))
    bound = max(-(-int(lengths.sum()) // capacity), -(-NUM // at_most), int((lengths > capacity // 2).sum()))
    assert plan.num_bins <= 1.02 * bound + 1 or mix == "pairs at best"
    assert lengths.sum() / (plan.num_bins * capacity) >= least

    order = np.random.default_rng(1).permutation(NUM)
    documents, offsets = deal(plan, order, lengths)
    assert np.array_equal(np.sort(documents), np.arange(NUM))
    assert np.add.reduceat(lengths[documents], offsets[:-1]).max() <= capacity


@pytest.mark.parametrize("largest", [0, 1, 65_535, 65_536, 2**31])
def test_stable_order_is_that_of_numpy(largest):
    values = np.random.default_rng(0).integers(0, largest + 1, 5000)
    assert np.array_equal(stable_order(values), np.argsort(values, kind="stable"))
