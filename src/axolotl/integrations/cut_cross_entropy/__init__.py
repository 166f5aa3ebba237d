"""Cut cross-entropy: the loss without the logits.

List `axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CutCrossEntropyPlugin": "axolotl.integrations.cut_cross_entropy.plugin",
        "CutCrossEntropyArgs": "axolotl.integrations.cut_cross_entropy.args",
    },
)
