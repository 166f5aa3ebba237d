"""MoRA: adapters that are square instead of low-rank.

List `axolotl.integrations.mora.MoraPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MoraPlugin": "axolotl.integrations.mora.plugin",
        "MoraArgs": "axolotl.integrations.mora.args",
        "MoraConfig": "axolotl.integrations.mora.args",
    },
)
