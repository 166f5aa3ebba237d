"""Hatchery: train on a remote service.

List `axolotl.integrations.hatchery.HatcheryPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "HatcheryPlugin": "axolotl.integrations.hatchery.plugin",
        "HatcheryArgs": "axolotl.integrations.hatchery.args",
        "HatcheryConfig": "axolotl.integrations.hatchery.args",
    },
)
