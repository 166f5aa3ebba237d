"""The plugin class of `axolotl.integrations.swanlab`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault, note_choice

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainerCallback


class SwanLabPlugin(BasePlugin):
    """Report to SwanLab. The tracker is a row of `axolotl.utils.callbacks.trackers`, like those that need no plugin."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.swanlab.args.SwanLabConfig"

    def add_callbacks_pre_trainer(self, cfg: DictDefault, model: nn.Module) -> list[TrainerCallback]:
        from axolotl.utils.callbacks.build import saved_config_path
        from axolotl.utils.callbacks.swanlab_ import SwanLabReportCallback

        if not cfg.use_swanlab:
            return []
        if cfg.swanlab_log_model:
            note_choice(cfg, "swanlab_log_model", False, "SwanLab keeps no models; `hub_model_id` uploads them")
        return [SwanLabReportCallback(cfg, saved_config_path(cfg))]

    def on_rollouts_scored(
        self, cfg: DictDefault, trainer: Trainer, prompts: list, completions: list, rewards: Any, **kwargs: Any
    ) -> None:
        from axolotl.utils.callbacks.swanlab_ import SwanLabReportCallback

        if not (cfg.use_swanlab and cfg.swanlab_log_completions and trainer.is_world_process_zero()):
            return
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, SwanLabReportCallback):
                callback.take_answers(prompts, completions, rewards, trainer.state.global_step)
