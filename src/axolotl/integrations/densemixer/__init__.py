"""DenseMixer: a dense gradient for the router of a mixture of experts.

List `axolotl.integrations.densemixer.DenseMixerPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DenseMixerPlugin": "axolotl.integrations.densemixer.plugin",
        "DenseMixerArgs": "axolotl.integrations.densemixer.args",
    },
)
