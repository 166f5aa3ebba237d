"""Module containing the Trainer class and related functions.

The documented place of the functions on rows and steps; they are defined on the data floor, which uses them itself.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from axolotl.core.builders.causal import HFCausalTrainerBuilder
from axolotl.core.builders.rl import HFRLTrainerBuilder
from axolotl.utils.data.rows import add_length, add_pose_position_ids, add_position_ids, drop_long_seq
from axolotl.utils.data.steps import calculate_total_num_steps
from axolotl.utils.dict import DictDefault

__all__ = [
    "add_length",
    "add_pose_position_ids",
    "add_position_ids",
    "calculate_total_num_steps",
    "drop_long_seq",
    "setup_trainer",
]


def setup_trainer(
    cfg: DictDefault,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    model: Any,
    tokenizer: Any,
    processor: Any,
    total_num_steps: int | None,
    model_ref: Any = None,
    peft_config: Any = None,
) -> Any:
    """Helper method for instantiating and building a (causal or RLHF) trainer.

    Args:
        cfg: the config.
        train_dataset: rows to train on.
        eval_dataset: rows to evaluate on, or None.
        model: the loaded model.
        tokenizer: its tokenizer.
        processor: its processor, for multimodal models.
        total_num_steps: optimizer steps of the run.
        model_ref: the reference model of a preference method.
        peft_config: the adapter's config.

    Returns:
        The trainer, ready to train.
    """
    if cfg.rl:
        builder = HFRLTrainerBuilder(cfg, model, tokenizer, processor)
        builder.model_ref = model_ref
    else:
        builder = HFCausalTrainerBuilder(cfg, model, tokenizer, processor)
    builder.peft_config = peft_config
    builder.train_dataset = train_dataset
    builder.eval_dataset = eval_dataset
    return builder.build(total_num_steps)
