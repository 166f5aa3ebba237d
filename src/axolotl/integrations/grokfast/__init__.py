"""Grokfast: amplify the slow part of the gradient.

List `axolotl.integrations.grokfast.GrokfastPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "GrokfastPlugin": "axolotl.integrations.grokfast.plugin",
        "GrokfastArgs": "axolotl.integrations.grokfast.args",
    },
)
