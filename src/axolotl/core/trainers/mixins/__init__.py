"""Mixins of the trainers: one concern each, and each method of `Trainer` is overridden by one of them only.

To add one: a module here, a row in `AxolotlTrainer.OWNERS`. A test compares the rows with the classes.
"""

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CheckpointSaveMixin": "axolotl.core.trainers.mixins.checkpoints",
        "OptimizerInitMixin": "axolotl.core.trainers.mixins.optimizer",
        "OptimizerMixin": "axolotl.core.trainers.mixins.optimizer",
        "PackingMixin": "axolotl.core.trainers.mixins.packing",
        "RngLoaderMixin": "axolotl.core.trainers.mixins.rng_state_loader",
        "SchedulerMixin": "axolotl.core.trainers.mixins.scheduler",
        "StepBatchesMixin": "axolotl.core.trainers.mixins.step_batches",
        "TokenLossMixin": "axolotl.core.trainers.mixins.token_loss",
    },
)
