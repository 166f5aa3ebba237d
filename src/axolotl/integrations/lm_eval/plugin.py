"""The plugin class of `axolotl.integrations.lm_eval`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class LMEvalPlugin(BasePlugin):
    """Evaluate with the lm-evaluation-harness."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.lm_eval.args.LMEvalArgs"
