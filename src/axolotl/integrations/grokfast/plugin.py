"""The plugin class of `axolotl.integrations.grokfast`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class GrokfastPlugin(BasePlugin):
    """Grokfast: amplify the slow part of the gradient."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.grokfast.args.GrokfastArgs"
