"""Collators: rows of a dataset into the tensors of one batch.

In: rows (dicts of lists or arrays), or bins of rows. Out: the batch described in `docs/architecture.md`. The arithmetic is
in `layout`, the documented classes in `batching` and `mamba`, and `build` picks the one that a config asks for.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DataCollatorForSeq2Seq": "axolotl.utils.collators.batching",
        "BatchSamplerDataCollatorForSeq2Seq": "axolotl.utils.collators.batching",
        "V2BatchSamplerDataCollatorForSeq2Seq": "axolotl.utils.collators.batching",
        "PretrainingBatchSamplerDataCollatorForSeq2Seq": "axolotl.utils.collators.batching",
        "MambaDataCollator": "axolotl.utils.collators.mamba",
        "build_collator": "axolotl.utils.collators.build",
    },
)
