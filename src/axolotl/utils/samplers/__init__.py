"""Samplers: which rows go into which batch.

In: the length of every row. Out: batches of row numbers, the same on every rank and every run with the same seed.
`best_fit` fills bins, `multipack` turns bins into batches, `epoch` orders rows and shares batches out to ranks, `geometry`
says how many bins of which size a config asks for.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MultipackBatchSampler": "axolotl.utils.samplers.multipack",
        "EpochSampler": "axolotl.utils.samplers.epoch",
        "EvenBatches": "axolotl.utils.samplers.epoch",
        "LengthGroupedEpochSampler": "axolotl.utils.samplers.epoch",
        "PackingGeometry": "axolotl.utils.samplers.geometry",
        "packing_geometry": "axolotl.utils.samplers.geometry",
        "get_dataset_lengths": "axolotl.utils.samplers.utils",
    },
)
