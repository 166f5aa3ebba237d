"""Keys of the spectrum plugin."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from axolotl.utils.schemas.fields import Float, Text, Words, key


class SpectrumArgs(Words):
    """Train only the layers with the highest signal-to-noise ratio (https://arxiv.org/abs/2406.06623)."""

    spectrum_top_fraction: Float | None = key("Share of the layers to train.", 0.5, gt=0, le=1)
    spectrum_model_name: Text | None = key("Model whose ratios to use. Default: `base_model`.")

    @model_validator(mode="before")
    @classmethod
    def fsdp_must_keep_original_parameters(cls, data: Any) -> Any:
        """Some parameters of a flattened group would be frozen and others not."""
        section = data.get("fsdp_config") if isinstance(data, dict) else None
        if (
            isinstance(section, dict)
            and section
            and not section.get("use_orig_params", section.get("fsdp_use_orig_params"))
        ):
            raise ValueError("FSDP + Spectrum requires `use_orig_params: true` under `fsdp_config`.")
        return data
