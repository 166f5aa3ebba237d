"""The plugin class of `axolotl.integrations.cut_cross_entropy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault, note_choice

if TYPE_CHECKING:
    from torch import nn


class CutCrossEntropyPlugin(BasePlugin):
    """The loss without the logits, which the trainer of causal models computes by itself.

    It is `axolotl.kernels.cross_entropy`: no package is needed, and every architecture whose output head is a linear layer
    has it. The builder of the trainer notes it, or why a model's loss needs full logits.
    """

    def get_input_args(self) -> str:
        return "axolotl.integrations.cut_cross_entropy.args.CutCrossEntropyArgs"

    def post_model_load(self, cfg: DictDefault, model: nn.Module) -> None:
        if cfg.cut_cross_entropy and (cfg.rl or cfg.reward_model or cfg.process_reward_model):
            note_choice(cfg, "cut_cross_entropy", False, "the trainer has a loss of its own, not a cross-entropy")
