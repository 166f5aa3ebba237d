"""Evaluate with the lm-evaluation-harness.

List `axolotl.integrations.lm_eval.LMEvalPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "LMEvalPlugin": "axolotl.integrations.lm_eval.plugin",
        "LMEvalArgs": "axolotl.integrations.lm_eval.args",
    },
)
