"""Where what the backward pass needs is kept: recomputed, in host memory, on disk, or some of each.

Checkpointing itself is transformers' and torch's. This room only changes where the saved tensors live (`transfers`,
`offload_cpu`, `offload_disk`), which results of a checkpointed layer are kept (`selective`), and puts both on a model
(`install`). To add a place: a class with `put` and `take` like `HostStore`, and its row in `install.STORES`.
"""

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CPU_Offloaded_Gradient_Checkpointer": "axolotl.monkeypatch.gradient_checkpointing.offload_cpu",
        "Disco": "axolotl.monkeypatch.gradient_checkpointing.offload_disk",
        "DiskOffloadManager": "axolotl.monkeypatch.gradient_checkpointing.offload_disk",
        "apply_activation_policies": "axolotl.monkeypatch.gradient_checkpointing.install",
    },
)
