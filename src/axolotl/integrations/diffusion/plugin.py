"""The plugin class of `axolotl.integrations.diffusion`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class DiffusionPlugin(BasePlugin):
    """Diffusion language models: learn to fill in masked tokens."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.diffusion.args.DiffusionArgs"
