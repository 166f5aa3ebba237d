"""The plugin class of `axolotl.integrations.kernels`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class KernelsPlugin(BasePlugin):
    """Kernels for mixtures of experts."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.kernels.args.KernelsArgs"
