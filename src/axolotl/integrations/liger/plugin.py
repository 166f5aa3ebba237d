"""The plugin class of `axolotl.integrations.liger`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault, note_choice

if TYPE_CHECKING:
    from torch import nn

LOSS_KEYS = ("liger_cross_entropy", "liger_fused_linear_cross_entropy", "liger_use_token_scaling")


class LigerPlugin(BasePlugin):
    """Layers in fewer kernels, with those of the package liger-kernel where it is installed.

    The loss keys are served by the fused linear cross-entropy of the trainer, on every device.
    """

    def get_input_args(self) -> str:
        return "axolotl.integrations.liger.args.LigerArgs"

    def post_model_load(self, cfg: DictDefault, model: nn.Module) -> None:
        """Swap the layers last: by now it is known which ones are compiled, or run as LoRA kernels."""
        # Here, and not above: plugins are loaded to check a config, which needs no torch.
        from axolotl.integrations.liger.apply import apply_liger_kernels

        apply_liger_kernels(cfg, model)
        if cfg.rl or cfg.reward_model or cfg.process_reward_model:
            for key in LOSS_KEYS:
                if cfg[key]:
                    note_choice(cfg, key, False, "the trainer has a loss of its own, not a cross-entropy")
