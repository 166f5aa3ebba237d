"""The plugin class of `axolotl.integrations.cut_cross_entropy`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class CutCrossEntropyPlugin(BasePlugin):
    """Cut cross-entropy: the loss without the logits."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.cut_cross_entropy.args.CutCrossEntropyArgs"
