"""Builder for causal trainers."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Trainer

from axolotl.core.builders.base import TrainerBuilderBase
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.exceptions import NotBuiltError
from axolotl.integrations.base import PluginManager
from axolotl.utils.collators.build import build_collator
from axolotl.utils.dict import note_choice

# Keys that bring another loss: the model then computes its own.
OTHER_LOSSES = (
    "cut_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "chunked_cross_entropy",
    "use_eaft",
)


class HFCausalTrainerBuilder(TrainerBuilderBase):
    """Builds the trainer of causal language models."""

    def build(self, total_num_steps: int | None) -> Trainer:
        """The trainer, with callbacks and collators.

        Args:
            total_num_steps: optimizer steps of the run; None for a stream.
        """
        cfg = self.cfg
        if cfg.reward_model or cfg.process_reward_model:
            raise NotBuiltError("`reward_model` and `process_reward_model` are not implemented yet.")
        kwargs = self.read_base_training_args(total_num_steps)
        kwargs["model_type"] = cfg.model_config_type
        kwargs["fused_linear_loss"] = not any(cfg[key] for key in OTHER_LOSSES)
        if kwargs["fused_linear_loss"]:
            note_choice(
                cfg, "loss", "fused linear cross-entropy", "exact over the global batch, without the logits in memory"
            )
        args = self.build_training_args(AxolotlTrainingArguments, kwargs)
        trainer_cls = self.read_trainer_cls(AxolotlTrainer)
        trainer_kwargs: dict[str, Any] = {
            "model": self.model,
            "args": args,
            "train_dataset": self.train_dataset,
            "eval_dataset": self.eval_dataset,
            "processing_class": self.processor or self.tokenizer,
            "data_collator": self.build_collator(args, is_eval=False),
            "callbacks": self.get_callbacks(),
            "optimizer_cls_and_kwargs": self.read_optimizer_cls_and_kwargs(args),
        }
        if "eval_data_collator" in inspect.signature(trainer_cls.__init__).parameters:
            trainer_kwargs["eval_data_collator"] = self.build_collator(args, is_eval=True)
            trainer_kwargs["dataset_tags"] = [
                d.path for d in cfg.datasets or [] if d.path and "/" in d.path and d.path[0] not in "./~"
            ]
        return self.create_trainer(trainer_cls, trainer_kwargs)

    def build_collator(self, training_args: Any, is_eval: bool = False) -> Any:
        """The collator: a plugin's, else the one that the config asks for."""
        plugin = PluginManager.get_instance().get_collator_cls_and_kwargs(self.cfg, is_eval=is_eval)
        if plugin is not None:
            collator_cls, extra = plugin if isinstance(plugin, tuple) else (plugin, {})
            return collator_cls(self.tokenizer, **extra)
        return build_collator(self.cfg, self.tokenizer, is_eval=is_eval, model=self.model, processor=self.processor)
