"""Kernels for mixtures of experts.

List `axolotl.integrations.kernels.KernelsPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "KernelsPlugin": "axolotl.integrations.kernels.plugin",
        "KernelsArgs": "axolotl.integrations.kernels.args",
    },
)
