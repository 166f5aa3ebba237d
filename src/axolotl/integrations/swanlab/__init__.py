"""Report to SwanLab.

List `axolotl.integrations.swanlab.SwanLabPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "SwanLabPlugin": "axolotl.integrations.swanlab.plugin",
        "SwanLabConfig": "axolotl.integrations.swanlab.args",
    },
)
