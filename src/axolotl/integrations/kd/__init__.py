"""Knowledge distillation: learn a teacher's log probabilities.

List `axolotl.integrations.kd.KDPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "KDPlugin": "axolotl.integrations.kd.plugin",
        "KDArgs": "axolotl.integrations.kd.args",
    },
)
