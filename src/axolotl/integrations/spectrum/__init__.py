"""Spectrum: train only the layers with the highest signal-to-noise ratio.

List `axolotl.integrations.spectrum.SpectrumPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "SpectrumPlugin": "axolotl.integrations.spectrum.plugin",
        "SpectrumArgs": "axolotl.integrations.spectrum.args",
    },
)
