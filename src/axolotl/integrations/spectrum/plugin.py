"""The plugin class of `axolotl.integrations.spectrum`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl.exceptions import ConfigError
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault, note_choice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_FRACTION = 0.5


class SpectrumPlugin(BasePlugin):
    """Spectrum: train only the layers with the highest signal-to-noise ratio.

    The ratios are measured on the weights that are about to be trained, so that no table of known models is needed.
    """

    def get_input_args(self) -> str:
        return "axolotl.integrations.spectrum.args.SpectrumArgs"

    def pre_lora_load(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        """Freeze all but the chosen layers, the embeddings and the head. Called for every model, adapter or not."""
        if model.config.use_cache:
            return  # loaded to answer
        if cfg.adapter:
            raise ConfigError(
                f"The spectrum plugin chooses layers to train in full, but `adapter: {cfg.adapter}` freezes them all. Remove one."
            )
        from axolotl.integrations.spectrum.ratios import choose_layers, patterns_for, read_or_measure
        from axolotl.utils.freeze import freeze_layers_except

        ratios = read_or_measure(cfg, model)
        fraction = cfg.spectrum_top_fraction or DEFAULT_FRACTION
        chosen = choose_layers(ratios, fraction)
        freeze_layers_except(model, [*patterns_for(chosen, model), *(cfg.unfrozen_parameters or [])])
        note_choice(
            cfg,
            "spectrum_top_fraction",
            fraction,
            f"{len(chosen)} of {len(ratios)} weight matrices train, those with the highest ratio of each kind, beside embeddings and head",
        )
