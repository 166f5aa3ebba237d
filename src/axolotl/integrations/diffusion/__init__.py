"""Diffusion language models: learn to fill in masked tokens.

List `axolotl.integrations.diffusion.DiffusionPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DiffusionPlugin": "axolotl.integrations.diffusion.plugin",
        "DiffusionArgs": "axolotl.integrations.diffusion.args",
        "DiffusionConfig": "axolotl.integrations.diffusion.args",
    },
)
