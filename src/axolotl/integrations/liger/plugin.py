"""The plugin class of `axolotl.integrations.liger`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class LigerPlugin(BasePlugin):
    """Kernels of the liger-kernel package."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.liger.args.LigerArgs"
