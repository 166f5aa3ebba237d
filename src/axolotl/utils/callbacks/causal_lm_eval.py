"""`do_causal_lm_eval`: what the model writes for the prompts of the evaluation set, measured against the answers there."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import TrainerCallback

from axolotl.core.trainers.causal_loss import perplexity
from axolotl.exceptions import ConfigError
from axolotl.utils.callbacks.generation import (
    GenerationSettings,
    find_stops,
    generate_answers,
    generating,
    is_sharded,
    share_of,
    split_row,
    tokenizer_of,
)
from axolotl.utils.callbacks.perplexity import Perplexity
from axolotl.utils.distributed import compute_and_broadcast, gather_on_all_ranks
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

PERPLEXITY = "perplexity"
# Metric -> packages that compute it. The first three are those of `evaluate`, which wraps sacrebleu.
PACKAGES: dict[str, tuple[str, ...]] = {
    "sacrebleu": ("sacrebleu",),
    "ter": ("sacrebleu",),
    "chrf": ("sacrebleu",),
    "comet": ("evaluate", "comet"),
    PERPLEXITY: (),
}
# Import name -> what to install. The model of comet comes with many requirements of its own, so that no extra has it.
INSTALL = {"sacrebleu": "'axolotl[metrics]'", "evaluate": "'axolotl[metrics]'", "comet": "unbabel-comet"}


def check_metrics(metrics: Sequence[str]) -> None:
    """The packages of all metrics are there.

    Raises:
        ConfigError: one is not.
    """
    absent = {
        package: metric
        for metric in metrics
        for package in PACKAGES[metric]
        if importlib.util.find_spec(package) is None
    }
    if absent:
        needed = ", ".join(f"`{package}` (for {metric})" for package, metric in absent.items())
        there = [metric for metric in PACKAGES if not set(PACKAGES[metric]) & set(absent)]
        raise ConfigError(
            f"`eval_causal_lm_metrics: [{', '.join(metrics)}]` needs packages that are not installed: {needed}. Install them with "
            f"`pip install {' '.join(dict.fromkeys(INSTALL[package] for package in absent))}`, or write "
            f"`eval_causal_lm_metrics: [{', '.join(there)}]`."
        )


def compute_metric(metric: str, sources: list[str], predictions: list[str], references: list[str]) -> float:
    """A text metric over the whole evaluation set, with the defaults of the `evaluate` package.

    Args:
        metric: `sacrebleu`, `ter`, `chrf` or `comet`.
        sources: prompts.
        predictions: what the model wrote.
        references: what it should have written.
    """
    if metric == "comet":
        import evaluate

        found = evaluate.load("comet").compute(sources=sources, predictions=predictions, references=references)
        return float(found["mean_score"])
    import sacrebleu

    corpus = {"sacrebleu": sacrebleu.corpus_bleu, "ter": sacrebleu.corpus_ter, "chrf": sacrebleu.corpus_chrf}[metric]
    return float(corpus(predictions, [references]).score)


class Answers(NamedTuple):
    """What one rank says of its rows.

    Attributes:
        sources: prompts.
        predictions: what the model wrote; empty when only the perplexity is asked for.
        references: what it should have written.
        total_loss: of the tokens of the references; 0 when the perplexity is not asked for.
        num_tokens: whose losses these are.
    """

    sources: list[str]
    predictions: list[str]
    references: list[str]
    total_loss: float
    num_tokens: int


class CausalLMBenchEvalCallback(TrainerCallback):
    """Answers every row of the evaluation set greedily and adds `eval_<metric>` to the metrics of the evaluation.

    Each rank answers its share of the rows. The metrics can be `metric_for_best_model`.

    Args:
        trainer: the trainer.
        metrics: names of `PACKAGES`.
        max_new_tokens: longest answer.
        max_seq_len: window of the perplexity, in tokens.
    """

    def __init__(self, trainer: Any, metrics: Sequence[str], max_new_tokens: int, max_seq_len: int):
        check_metrics(metrics)
        self.trainer = trainer
        self.metrics = tuple(metrics)
        self.settings = GenerationSettings("causal_lm_eval", 0, max_new_tokens)
        self.perplexity = Perplexity(tokenizer_of(trainer), max_seq_len)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        # `axolotl evaluate` evaluates the training set as well, under another prefix.
        if metrics is None or "eval_loss" not in metrics or not len(self.trainer.eval_dataset):
            return
        scores = self.compute(self.trainer.eval_dataset)
        # The trainer chooses the best model by this very dict.
        metrics.update(scores)
        self.trainer.log(dict(scores))
        LOG.info(f"step {state.global_step}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))

    def compute(self, rows: Any) -> dict[str, float]:
        """The metrics over all rows, the same on all ranks."""
        rank, num_ranks = share_of(self.trainer)
        mine = self._answer([rows[index] for index in range(rank, len(rows), num_ranks)])
        shares = gather_on_all_ranks(mine) if num_ranks > 1 else [mine]
        sources = [text for share in shares for text in share.sources]
        predictions = [text for share in shares for text in share.predictions]
        references = [text for share in shares for text in share.references]
        scores = compute_and_broadcast(
            lambda: {
                f"eval_{metric}": compute_metric(metric, sources, predictions, references)
                for metric in self.metrics
                if metric != PERPLEXITY
            }
        )
        total, count = sum(share.total_loss for share in shares), sum(share.num_tokens for share in shares)
        if PERPLEXITY in self.metrics and count:
            scores["eval_perplexity"] = perplexity(total / count)
        return scores

    def _answer(self, rows: list[Any]) -> Answers:
        """What the model writes for some rows."""
        trainer, tokenizer = self.trainer, self.perplexity.tokenizer
        parts = [split_row(row["input_ids"], row["labels"], self.settings.prompt_ratio) for row in rows]
        sources, references = (
            tokenizer.batch_decode([part[place] for part in parts], skip_special_tokens=True) for place in (0, 1)
        )
        predictions: list[str] = []
        total, count = 0.0, 0
        with generating(trainer) as model:
            if any(metric != PERPLEXITY for metric in self.metrics):
                answers = generate_answers(
                    model,
                    tokenizer,
                    [prompt for prompt, _ in parts],
                    self.settings,
                    find_stops(tokenizer, model, [answer for _, answer in parts]),
                    batch_size=trainer.args.per_device_eval_batch_size,
                    synced_gpus=is_sharded(trainer),
                )
                predictions = tokenizer.batch_decode(answers, skip_special_tokens=True)
            if PERPLEXITY in self.metrics:
                total, count = self.perplexity.sum_losses(model, references)
        return Answers(sources, predictions, references, total, count)
