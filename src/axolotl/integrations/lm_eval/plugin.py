"""The plugin class of `axolotl.integrations.lm_eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from axolotl.exceptions import ConfigError
from axolotl.integrations.base import BasePlugin
from axolotl.integrations.lm_eval.args import LMEvalArgs
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

LOG = get_logger(__name__)


class LMEvalPlugin(BasePlugin):
    """Evaluate with the lm-evaluation-harness, after training and with `axolotl lm-eval`."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.lm_eval.args.LMEvalArgs"

    def add_callbacks_pre_trainer(self, cfg: DictDefault, model: nn.Module) -> list[TrainerCallback]:
        """No callback: it is found out here, and not after hours, that the harness is not installed."""
        from axolotl.integrations.lm_eval.harness import check_harness

        if cfg.lm_eval_post_train and cfg.lm_eval_tasks:
            check_harness()
        return []

    def post_train_unload(self, cfg: DictDefault) -> None:
        from axolotl.integrations.lm_eval.harness import evaluate_with_harness
        from axolotl.utils.distributed import is_main_process

        if not cfg.lm_eval_post_train or not is_main_process():
            return
        if not cfg.lm_eval_tasks:
            LOG.warning("The lm_eval plugin is listed without `lm_eval_tasks`: nothing is evaluated.")
            return
        evaluate_with_harness(cfg)

    def evaluate(self, cfg: DictDefault) -> None:
        """`axolotl lm-eval`: the same for a config that need not be one of a training.

        Args:
            cfg: the config as written.
        """
        from axolotl.integrations.lm_eval.harness import evaluate_with_harness

        own = {key: value for key, value in cfg.items() if str(key).startswith("lm_eval_")}
        for key in own:
            if key not in LMEvalArgs.model_fields:
                raise ConfigError(
                    f"`{key}` is not a key of the lm_eval plugin. It has {', '.join(LMEvalArgs.model_fields)}."
                )
        evaluate_with_harness(DictDefault({**cfg, **LMEvalArgs.model_validate(own).model_dump()}))
