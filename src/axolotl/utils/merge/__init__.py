"""Merging a trained adapter into its base model, tensor by tensor, in bounded memory.

In: a base model (folder or hub id) and a PEFT LoRA adapter. Out: a folder that `from_pretrained` loads without PEFT, and
a `MergeReport` that says how far it differs from base plus adapter.

| module | owns |
|---|---|
| `merge` | the story: plan, write aside, prove, rename |
| `merged` | what each tensor of the merged model is made of |
| `report` | what was done, and how exactly |
| `files` | the folders: the base's, what is copied of it, the result's |
| `adapter` | what the adapter does to each parameter; the arithmetic is that of PEFT's own layers, in float32 |
| `names` | stored tensor names <-> parameter names of the model class |
| `tensors` | reading and writing weight files one tensor at a time |
| `four_bit` | bitsandbytes NF4, FP4 and int8: round trip and stored weights |
| `replication` | layers that the merged model has more than once |
| `base` | single weights of a folder, for ReLoRA |
| `proof` | logits of base plus adapter against logits of the merged model |
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__all__ = ["EightBit", "FourBit", "MergeReport", "merge_adapter"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "merge_adapter": "axolotl.utils.merge.merge",
        "MergeReport": "axolotl.utils.merge.report",
        "FourBit": "axolotl.utils.merge.four_bit",
        "EightBit": "axolotl.utils.merge.four_bit",
    },
)
