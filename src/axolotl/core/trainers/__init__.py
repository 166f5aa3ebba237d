"""Trainers: what happens between a batch and an optimizer step.

Comes in: a model, datasets, a collator, training arguments. Goes out: a trained model, log lines, checkpoints. `base` has
the causal trainer; `mixins` has one class per concern, each overriding few methods and calling plain functions. To add a
trainer: subclass `AxolotlTrainer` in a module of this room, and name it in the builder.
"""

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__, {"AxolotlTrainer": "axolotl.core.trainers.base"})
