"""Builder for causal trainers."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from axolotl.core.builders.arguments import read_loss_args
from axolotl.core.builders.base import TrainerBuilderBase
from axolotl.core.trainers.adopted import adopt_trainer_cls, check_is_set_up, own_batches, path_of
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.trainers.batch_size import fits_in_memory, largest_that_fits, possible_sizes
from axolotl.core.trainers.causal_loss import find_output_head, is_causal_lm
from axolotl.core.trainers.utils import is_hub_name
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.exceptions import NotBuiltError, OutOfMemoryError
from axolotl.integrations.base import PluginManager
from axolotl.loaders.utils import plain_model
from axolotl.utils.collators.build import build_collator, is_packed
from axolotl.utils.data.streaming import is_streamed
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

# Keys that ask for what the fused linear cross-entropy is.
SAME_LOSS = (
    "cut_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "flash_attn_cross_entropy",
)

SERVED = "the loss that needs no package: the logits never exist, rows without a label are dropped before the head"


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
        trainer_cls = self._adopt(self.read_trainer_cls(AxolotlTrainer))
        self._note_loss(trainer_cls)
        kwargs.update(read_loss_args(cfg))
        args = self.build_training_args(AxolotlTrainingArguments, kwargs)
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
        return self.create_trainer(trainer_cls, trainer_kwargs)

    def hook_post_create_trainer(self, trainer: Trainer) -> Trainer:
        """Give the trainer what a constructor that somebody else wrote may not take."""
        check_is_set_up(trainer)
        if isinstance(trainer, AxolotlTrainer):
            trainer.eval_data_collator = self.build_collator(trainer.args, is_eval=True)
            trainer.dataset_tags = [d.path for d in self.cfg.datasets or [] if is_hub_name(d.path)]
        return super().hook_post_create_trainer(trainer)

    def _adopt(self, trainer_cls: type[Trainer]) -> type[AxolotlTrainer]:
        """The trainer class with ours under it, and what there is to say about it."""
        adopted = adopt_trainer_cls(trainer_cls)
        if adopted is not trainer_cls:
            note_choice(
                self.cfg,
                "trainer class",
                path_of(trainer_cls),
                "inherits from `AxolotlTrainer` for this run, so that packing, the optimizer and other keys hold; what the class "
                "overrides wins",
            )
        for method, is_eval in (("get_train_dataloader", False), ("get_eval_dataloader", True)):
            if is_packed(self.cfg, is_eval) and own_batches(trainer_cls, method):
                key = (
                    "eval_sample_packing" if is_eval and self.cfg.eval_sample_packing is not None else "sample_packing"
                )
                LOG.warning(
                    f"`{key}: true`: `{path_of(trainer_cls)}` makes its own batches in `{method}`. They are packed only if it takes "
                    f"them from `super().{method}()`."
                )
        return adopted

    def _note_loss(self, trainer_cls: type[AxolotlTrainer]) -> None:
        """Record which loss it will be, as far as it can be told without running the model."""
        if trainer_cls.compute_loss is not AxolotlTrainer.compute_loss:
            note_choice(
                self.cfg, "loss", f"{path_of(trainer_cls)}.compute_loss", "the trainer class has one of its own"
            )
            return
        base = plain_model(self.model)
        if is_causal_lm(base):
            found = find_output_head(base)
            name = "cross-entropy of full logits" if isinstance(found, str) else "fused linear cross-entropy"
            memory = found if isinstance(found, str) else "without the logits in memory"
            note_choice(self.cfg, "loss", name, f"exact over the global batch; {memory}")
            for key in SAME_LOSS:
                if self.cfg[key]:
                    note_choice(
                        self.cfg, key, name, f"runs in its place: {found}" if isinstance(found, str) else SERVED
                    )

    def build_collator(self, training_args: Any, is_eval: bool = False) -> Any:
        """The collator: a plugin's, else the one that the config asks for."""
        plugin = PluginManager.get_instance().get_collator_cls_and_kwargs(self.cfg, is_eval=is_eval)
        if plugin is not None:
            collator_cls, extra = plugin if isinstance(plugin, tuple) else (plugin, {})
            return collator_cls(self.tokenizer, **extra)
        return build_collator(self.cfg, self.tokenizer, is_eval=is_eval, model=self.model, processor=self.processor)

    def settle_batch_size(self, trainer: Any) -> None:
        """`auto_find_batch_size`: give the trainer the largest micro-batch that fits, with the same rows per optimizer step.

        Raises:
            OutOfMemoryError: not even one row fits.
        """
        cfg = self.cfg
        reason = why_not_tried(cfg, trainer)
        if reason is not None:
            note_choice(cfg, "auto_find_batch_size", False, reason)
            return
        written = (cfg.micro_batch_size, cfg.gradient_accumulation_steps)
        self.set_batch_size(trainer, self.find_batch_size(trainer))
        note_choice(
            cfg,
            "micro_batch_size",
            cfg.micro_batch_size,
            f"the largest that fits; with `gradient_accumulation_steps: {cfg.gradient_accumulation_steps}` an optimizer step takes as "
            f"many rows as with {written[0]} x {written[1]}",
        )

    def find_batch_size(self, trainer: Any) -> int:
        """The largest micro-batch size that fits on every rank."""

        def fits(size: int) -> bool:
            self.set_batch_size(trainer, size)
            return fits_in_memory(trainer, self.cfg)

        args = trainer.args
        found = largest_that_fits(
            possible_sizes(args.per_device_train_batch_size * args.gradient_accumulation_steps), fits
        )
        if found is None:
            raise OutOfMemoryError(
                f"`auto_find_batch_size: true`: not even `micro_batch_size: 1` fits, with `sequence_len: {self.cfg.sequence_len}`."
            )
        return found

    def set_batch_size(self, trainer: Any, size: int) -> None:
        """Split the rows of an optimizer step into micro-batches of `size`, wherever the split is known."""
        cfg, args = self.cfg, trainer.args
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        cfg.micro_batch_size = args.per_device_train_batch_size = trainer._train_batch_size = size
        cfg.gradient_accumulation_steps = args.gradient_accumulation_steps = rows // size
        trainer.data_collator = self.build_collator(args, is_eval=False)


def why_not_tried(cfg: DictDefault, trainer: Any) -> str | None:
    """Why `auto_find_batch_size` leaves the micro-batch as it is written; None when it looks for a better one."""
    if trainer.args.device.type != "cuda":
        return f"on a {trainer.args.device.type} no device memory can be tried; `micro_batch_size` stays as it is"
    if not isinstance(trainer, AxolotlTrainer):
        return "only the trainer of causal models can try a step; `micro_batch_size` stays as it is"
    if is_streamed(cfg):
        return (
            "the micro-batches of a stream are made before its longest row is known; `micro_batch_size` stays as it is"
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "sharded weights are not spread over the ranks before training; `micro_batch_size` stays as it is"
    return None
