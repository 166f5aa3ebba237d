"""The optimizer of a run: param groups by name, and optimizers that transformers does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import get_parameter_names

from axolotl.integrations.base import PluginManager
from axolotl.utils.optimizers.groups import build_param_groups

FORBIDDEN_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


class OptimizerMixin(Trainer):
    """Param groups for embeddings, named modules and LoRA+. A plugin's optimizer wins over all."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Set up the optimizer: a plugin's, LoRA+'s, or that of the arguments over our param groups."""
        if self.optimizer is not None:
            return self.optimizer
        args = self.args
        opt_model = self.model if model is None else model
        self.optimizer = PluginManager.get_instance().create_optimizer(self)
        if self.optimizer is not None:
            return self.optimizer
        has_groups = bool(args.lr_groups) or args.embedding_lr is not None or args.embedding_lr_scale is not None
        if args.loraplus_lr_ratio is None and not has_groups:
            return super().create_optimizer(model)

        if self.optimizer_cls_and_kwargs is not None:
            optimizer_cls, kwargs = self.optimizer_cls_and_kwargs
        else:
            optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(args, opt_model)
        kwargs = dict(kwargs)
        if args.loraplus_lr_ratio is not None:
            from peft.optimizers import create_loraplus_optimizer

            self.optimizer = create_loraplus_optimizer(
                self.accelerator.unwrap_model(opt_model),
                optimizer_cls,
                loraplus_lr_ratio=args.loraplus_lr_ratio,
                loraplus_lr_embedding=args.loraplus_lr_embedding,
                loraplus_weight_decay=args.weight_decay,
                **kwargs,
            )
            return self.optimizer
        decay_names = set(get_parameter_names(opt_model, [nn.LayerNorm], FORBIDDEN_DECAY))
        groups = build_param_groups(
            opt_model.named_parameters(),
            decay_names=decay_names,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            embedding_lr=args.embedding_lr,
            embedding_lr_scale=args.embedding_lr_scale,
            lr_groups=args.lr_groups,
        )
        self.optimizer = optimizer_cls(groups, **kwargs)
        return self.optimizer


class OptimizerInitMixin(Trainer):
    """For trainers whose constructor lacks `optimizer_cls_and_kwargs`: takes it, and sets it afterwards."""

    def __init__(self, *args: Any, **kwargs: Any):
        optimizer_cls_and_kwargs = kwargs.pop("optimizer_cls_and_kwargs", None)
        super().__init__(*args, **kwargs)
        if optimizer_cls_and_kwargs is not None:
            self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
