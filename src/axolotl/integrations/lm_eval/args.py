"""Keys of the lm_eval plugin."""

from __future__ import annotations

from axolotl.utils.schemas.fields import Int, Text, Words, key


class LMEvalArgs(Words):
    """Evaluate with the lm-evaluation-harness."""

    lm_eval_tasks: list[str] = key("Tasks to evaluate.", [])
    lm_eval_batch_size: Int | str | None = key("Sequences at a time.", 8)
    lm_eval_post_train: bool | None = key("Evaluate after training.", True)
    lm_eval_model: Text | None = key("Model to evaluate. Default: the trained one.")
