"""The plugin class of `axolotl.integrations.swanlab`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class SwanLabPlugin(BasePlugin):
    """Report to SwanLab."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.swanlab.args.SwanLabConfig"
