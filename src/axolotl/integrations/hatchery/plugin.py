"""The plugin class of `axolotl.integrations.hatchery`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class HatcheryPlugin(BasePlugin):
    """Hatchery: train on a remote service."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.hatchery.args.HatcheryArgs"
