"""The optimizer of a run: param groups by name, factories, and the weights that are saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.training_args import ParallelMode

from axolotl.exceptions import ConfigError
from axolotl.integrations.base import BaseOptimizerFactory, PluginManager
from axolotl.utils.optimizers.groups import loraplus_groups, param_groups_of
from axolotl.utils.optimizers.state import keep_loaded_dtypes
from axolotl.utils.schemas.validation.optimizer import UPDATES_IN_BACKWARD

# Arguments by which transformers passes what should be optimized, instead of param groups.
OWN_PARAMETERS = ("params", "model", "optimizer_dict")


class OptimizerMixin(Trainer):
    """Param groups for embeddings, named modules and LoRA+. A plugin's optimizer wins over all."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Set up the optimizer: a plugin's, LoRA+'s, or that of the arguments over our param groups.

        Raises:
            ConfigError: the optimizer refuses its arguments or these parameters.
        """
        if self.optimizer is not None:
            return self.optimizer
        opt_model = self.model if model is None else model
        self.optimizer = PluginManager.get_instance().create_optimizer(self)
        if self.optimizer is not None:
            return self.optimizer
        if self.optimizer_cls_and_kwargs:  # those of a config hold `optimizer_kwargs` already
            optimizer_cls, kwargs = self.optimizer_cls_and_kwargs
        else:
            optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            kwargs = {**kwargs, **(self.args.optimizer_kwargs or {})}
        if any(key in kwargs for key in OWN_PARAMETERS):
            given, self.optimizer_cls_and_kwargs = self.optimizer_cls_and_kwargs, (optimizer_cls, dict(kwargs))
            try:
                return super().create_optimizer(model)  # takes keys out of the dict
            finally:
                self.optimizer_cls_and_kwargs = given
        try:
            self.optimizer = self._build_optimizer(opt_model, optimizer_cls, dict(kwargs))
        except ConfigError:
            raise
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(
                f"`optimizer: {self._optimizer_name()}` cannot be set up: {error}. Its arguments were "
                f"{ {key: value for key, value in kwargs.items() if not isinstance(value, type)} }; see `optim_args`."
            ) from error
        keep_loaded_dtypes(self.optimizer)
        return self.optimizer

    def _optimizer_name(self) -> str:
        return self.args.alternate_optimizer or self.args.optim.value

    def _build_optimizer(self, model: nn.Module, optimizer_cls: Any, kwargs: dict[str, Any]) -> torch.optim.Optimizer:
        args = self.args
        if "bitsandbytes" in sys.modules:
            forget_bitsandbytes_overrides()
        is_class = isinstance(optimizer_cls, type)
        if is_class and issubclass(optimizer_cls, BaseOptimizerFactory):
            if args.loraplus_lr_ratio is not None:
                raise ConfigError(
                    f"`loraplus_lr_ratio` cannot be used with `optimizer: {self._optimizer_name()}`, which forms its own groups of "
                    "parameters. Remove it, or write `optimizer: adamw_torch_fused`."
                )
            if self._optimizer_name() in UPDATES_IN_BACKWARD:
                self._check_in_backward()
            optimizer = optimizer_cls()(model, args, **kwargs)
            if optimizer is None:
                raise ConfigError(f"the optimizer factory `{optimizer_cls.__name__}` created no optimizer.")
            return optimizer
        if not (is_class and issubclass(optimizer_cls, torch.optim.Optimizer)):
            return optimizer_cls()(model, **kwargs)  # a factory of transformers
        rate = kwargs.get("lr", args.learning_rate)
        groups = param_groups_of(model, args, rate, kwargs.get("weight_decay", args.weight_decay))
        if args.loraplus_lr_ratio is not None:
            groups = loraplus_groups(
                model, groups, learning_rate=rate, ratio=args.loraplus_lr_ratio, embedding_lr=args.loraplus_lr_embedding
            )
        optimizer = optimizer_cls(groups, **kwargs)
        if "bitsandbytes" in optimizer_cls.__module__ and kwargs.get("optim_bits") == 8:
            keep_embeddings_in_32_bits(model)
        return optimizer

    def _check_in_backward(self) -> None:
        """Raise ConfigError where updates inside the backward pass cannot be right."""
        name, args = self._optimizer_name(), self.args
        if args.gradient_accumulation_steps > 1:
            raise ConfigError(
                f"`optimizer: {name}` updates the weights in every backward pass and cannot accumulate gradients: "
                f"`gradient_accumulation_steps: {args.gradient_accumulation_steps}`. Write `gradient_accumulation_steps: 1` with a "
                "larger `micro_batch_size`."
            )
        if args.fp16:
            raise ConfigError(
                f"`optimizer: {name}` updates the weights before a loss scale can be checked. Write `bf16: true`."
            )
        if args.parallel_mode == ParallelMode.DISTRIBUTED:
            raise ConfigError(
                f"`optimizer: {name}` updates the weights before gradients are averaged over GPUs. Train on one GPU."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model` of the weights that evaluations see.

        A schedule-free optimizer trains at one point and evaluates at the average of all. The switch back happens at the
        next training step, so that weights and optimizer state of a checkpoint fit.
        """
        self._show_averaged_weights()
        super().save_model(output_dir, _internal_call)

    def _load_best_model(self) -> None:
        # Later switches of the optimizer must not mix the loaded weights with its own.
        self._show_averaged_weights()
        load_converted = getattr(self, "load_converted", None)  # of `CheckpointSaveMixin`
        if load_converted is None or not load_converted(Path(str(self.state.best_model_checkpoint))):
            super()._load_best_model()

    def _show_averaged_weights(self) -> None:
        switch = getattr(self.optimizer, "eval", None)
        if switch is not None:
            switch()


def forget_bitsandbytes_overrides() -> None:
    """Drop what an earlier optimizer of this process found: bitsandbytes keeps it by position, for every optimizer.

    Overrides of modules and parameters stay, and are looked up again.
    """
    from bitsandbytes.optim import GlobalOptimManager

    GlobalOptimManager.get_instance().index2config.clear()


def keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Let 8-bit optimizers of bitsandbytes keep the states of embeddings in 32 bits, which are updated rarely and unevenly."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


class OptimizerInitMixin(Trainer):
    """For trainers whose constructor lacks `optimizer_cls_and_kwargs`: takes it, and sets it afterwards."""

    def __init__(self, *args: Any, **kwargs: Any):
        optimizer_cls_and_kwargs = kwargs.pop("optimizer_cls_and_kwargs", None)
        super().__init__(*args, **kwargs)
        if optimizer_cls_and_kwargs is not None:
            self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
