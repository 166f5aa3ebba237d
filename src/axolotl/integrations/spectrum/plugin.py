"""The plugin class of `axolotl.integrations.spectrum`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class SpectrumPlugin(BasePlugin):
    """Spectrum: train only the layers with the highest signal-to-noise ratio."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.spectrum.args.SpectrumArgs"
