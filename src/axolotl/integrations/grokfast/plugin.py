"""The plugin class of `axolotl.integrations.grokfast`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl.exceptions import ConfigError
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.validation.optimizer import UPDATES_IN_BACKWARD

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback


class GrokfastPlugin(BasePlugin):
    """Grokfast: amplify the slow part of the gradient."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.grokfast.args.GrokfastArgs"

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Trainer) -> list[TrainerCallback]:
        from axolotl.integrations.grokfast.optimizer import GrokfastCallback

        if cfg.optimizer in UPDATES_IN_BACKWARD:
            raise ConfigError(
                f"`optimizer: {cfg.optimizer}` updates weights in the backward pass, where the grokfast plugin finds no gradients. "
                "Write `optimizer: adamw_torch_fused`."
            )
        defaults = {"grokfast_alpha": 0.98, "grokfast_lamb": 2.0}
        alpha, lamb = (value if cfg[key] is None else cfg[key] for key, value in defaults.items())
        return [GrokfastCallback(alpha, lamb)]
