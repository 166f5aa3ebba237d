"""Kernels of the liger-kernel package.

List `axolotl.integrations.liger.LigerPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "LigerPlugin": "axolotl.integrations.liger.plugin",
        "LigerArgs": "axolotl.integrations.liger.args",
    },
)
