"""The plugin class of `axolotl.integrations.densemixer`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class DenseMixerPlugin(BasePlugin):
    """DenseMixer: a dense gradient for the router of a mixture of experts."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.densemixer.args.DenseMixerArgs"
