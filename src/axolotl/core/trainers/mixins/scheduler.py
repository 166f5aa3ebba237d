"""The learning rate schedule of a run."""

from __future__ import annotations

from typing import cast

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer

from axolotl.integrations.base import PluginManager
from axolotl.utils.logging import get_logger
from axolotl.utils.schedulers import Schedule, build_scheduler

LOG = get_logger(__name__)


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
        # Set up by now; the annotation of transformers also names None and the stand-in of accelerate for DeepSpeed.
        optimizer = cast("torch.optim.Optimizer", self.optimizer if optimizer is None else optimizer)
        scheduler = PluginManager.get_instance().create_lr_scheduler(self, optimizer, num_training_steps)
        if scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            if warmup >= num_training_steps:
                LOG.warning(
                    f"The warmup of {warmup} steps is as long as the run of {num_training_steps}: the learning rate never reaches "
                    f"{self.args.learning_rate:g}. Write a smaller `warmup_steps`."
                )
            scheduler = build_scheduler(self._read_schedule(), optimizer, warmup, num_training_steps)
        self.lr_scheduler = scheduler
        self._created_lr_scheduler = True
        return scheduler

    def _read_schedule(self) -> Schedule:
        args = self.args
        return Schedule(
            name=args.alternate_lr_scheduler_type or getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
            learning_rate=args.learning_rate,
            kwargs=args.lr_scheduler_kwargs or {},
            quadratic_warmup=args.lr_quadratic_warmup,
            min_lr_ratio=args.cosine_min_lr_ratio,
            constant_lr_ratio=args.cosine_constant_lr_ratio,
            div_factor=args.lr_div_factor,
            restart_steps=args.jagged_restart_steps,
            restart_warmup_steps=args.jagged_restart_warmup_steps,
            restart_anneal_steps=args.jagged_restart_anneal_steps,
        )
