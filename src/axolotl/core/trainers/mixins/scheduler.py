"""The learning rate schedule of a run."""

from __future__ import annotations

from typing import cast

import torch
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from transformers import Trainer

from axolotl.integrations.base import PluginManager
from axolotl.utils.schedulers import (
    JaggedLRRestartScheduler,
    RexLR,
    get_cosine_schedule_with_min_lr,
    get_cosine_schedule_with_quadratic_warmup,
    get_cosine_schedule_with_warmup_decay_constant,
)


class SchedulerMixin(Trainer):
    """Adds the schedules that transformers lacks. A plugin's scheduler wins over all."""

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Set up the scheduler. The optimizer must have been set up before, or be passed.

        Args:
            num_training_steps: optimizer steps of the whole run.
            optimizer: the optimizer; `self.optimizer` when None.
        """
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        args = self.args
        # Set up by now; the annotation of transformers also names None and the stand-in of accelerate for DeepSpeed.
        optimizer = cast("torch.optim.Optimizer", self.optimizer if optimizer is None else optimizer)
        warmup = args.get_warmup_steps(num_training_steps)
        is_cosine = str(args.lr_scheduler_type) in ("cosine", "SchedulerType.COSINE")

        scheduler = PluginManager.get_instance().create_lr_scheduler(self, optimizer, num_training_steps)
        if scheduler is not None:
            self.lr_scheduler = scheduler
        elif args.alternate_lr_scheduler_type == "one_cycle":
            extra = dict(args.lr_scheduler_kwargs or {})
            # A rise of exactly one step would make torch divide by zero.
            extra.setdefault("pct_start", min((2 if warmup == 1 else warmup) / num_training_steps, 1.0))
            if args.lr_div_factor is not None:
                extra.setdefault("div_factor", args.lr_div_factor)
            rates = [group["lr"] for group in optimizer.param_groups]
            self.lr_scheduler = OneCycleLR(optimizer, max_lr=rates, total_steps=num_training_steps, **extra)
        elif args.alternate_lr_scheduler_type == "rex":
            self.lr_scheduler = RexLR(
                optimizer,
                max_lr=args.learning_rate,
                min_lr=0 if not args.cosine_min_lr_ratio else args.learning_rate * args.cosine_min_lr_ratio,
                total_steps=num_training_steps,
                num_warmup_steps=warmup,
            )
        elif is_cosine and args.lr_quadratic_warmup:
            self.lr_scheduler = get_cosine_schedule_with_quadratic_warmup(optimizer, warmup, num_training_steps)
        elif is_cosine and args.cosine_min_lr_ratio and args.cosine_constant_lr_ratio:
            self.lr_scheduler = get_cosine_schedule_with_warmup_decay_constant(
                optimizer, warmup, num_training_steps, args.cosine_constant_lr_ratio, args.cosine_min_lr_ratio
            )
        elif is_cosine and args.cosine_min_lr_ratio:
            self.lr_scheduler = get_cosine_schedule_with_min_lr(
                optimizer, warmup, num_training_steps, args.cosine_min_lr_ratio
            )
        else:
            super().create_scheduler(num_training_steps, optimizer)
        if args.jagged_restart_steps:
            self.lr_scheduler = JaggedLRRestartScheduler(
                optimizer,
                self.lr_scheduler,
                args.jagged_restart_steps,
                args.jagged_restart_warmup_steps or 10,
                args.jagged_restart_anneal_steps or 1,
                args.cosine_min_lr_ratio or 0.001,
            )
        self._created_lr_scheduler = True
        return self.lr_scheduler
