"""The plugin class of `axolotl.integrations.mora`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class MoraPlugin(BasePlugin):
    """MoRA: adapters that are square instead of low-rank."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.mora.args.MoraArgs"
