"""`AxolotlTrainer`: transformers' `Trainer` with an exact loss, exact data order and checkpoints that cannot be half."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from typing import Any, Literal

import torch
from transformers import Trainer

from axolotl.core.trainers.causal_loss import perplexity
from axolotl.core.trainers.mixins.checkpoints import CheckpointSaveMixin
from axolotl.core.trainers.mixins.optimizer import OptimizerMixin
from axolotl.core.trainers.mixins.packing import PackingMixin
from axolotl.core.trainers.mixins.rng_state_loader import RngLoaderMixin
from axolotl.core.trainers.mixins.scheduler import SchedulerMixin
from axolotl.core.trainers.mixins.token_loss import TokenLossMixin
from axolotl.core.trainers.model_walks import quick_walks
from axolotl.core.trainers.nonfinite import NonFiniteGuard
from axolotl.core.trainers.utils import memory_metrics, sanitize_kwargs_for_tagging
from axolotl.core.trainers.watch import StepWatch
from axolotl.exceptions import ConfigError
from axolotl.utils.callbacks.hardware import flops_per_token, peak_flops
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

REDUCTIONS = {
    "mean": lambda values: sum(values) / len(values),
    "min": min,
    "max": max,
    "sum": sum,
}


class AxolotlTrainer(
    PackingMixin, SchedulerMixin, OptimizerMixin, RngLoaderMixin, CheckpointSaveMixin, TokenLossMixin, Trainer
):
    """The trainer of causal language models.

    Args:
        *_args: as `Trainer`.
        bench_data_collator: collator of the benchmark evaluation.
        eval_data_collator: collator of the evaluation set; that of training when None.
        dataset_tags: names of the datasets, for the model card.
        **kwargs: as `Trainer`.
    """

    args: Any  # AxolotlTrainingArguments, or a TRL config with AxolotlTrainingMixins

    # Which class overrides which method of Trainer. No method has two owners.
    OWNERS: dict[str, tuple[str, ...]] = {
        "PackingMixin": ("_get_train_sampler", "_get_dataloader", "get_train_dataloader", "get_eval_dataloader"),
        "SchedulerMixin": ("create_scheduler",),
        "OptimizerMixin": ("create_optimizer", "save_model", "_load_best_model"),
        "RngLoaderMixin": ("_load_rng_state", "_load_optimizer_and_scheduler", "_load_callback_state"),
        "CheckpointSaveMixin": (
            "_inner_training_loop",
            "_finalize_training",
            "_save",
            "_save_checkpoint",
            "_load_from_checkpoint",
            "_issue_warnings_after_load",
        ),
        "TokenLossMixin": (
            "training_step",
            "compute_loss",
            "prediction_step",
            "evaluation_loop",
        ),
        "StepBatchesMixin": ("get_batch_samples",),
        "AxolotlTrainer": (
            "log",
            "evaluate",
            "push_to_hub",
            "create_model_card",
            "floating_point_ops",
            "_run_epoch",
            "_get_grad_norm",
            "_maybe_log_save_evaluate",
        ),
    }

    tag_names = ("axolotl",)
    is_set_up = False  # becomes True in the constructor, which a class that inherits from this one may pass by

    def __init__(
        self,
        *_args: Any,
        bench_data_collator: Any = None,
        eval_data_collator: Any = None,
        dataset_tags: list[str] | None = None,
        **kwargs: Any,
    ):
        self.bench_data_collator = bench_data_collator
        self.eval_data_collator = eval_data_collator
        self.dataset_tags = dataset_tags
        self._stored_metrics: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        self.writes_model_card = True
        self.stop_requested = False  # this rank was asked to stop; `StepWatch` tells the others
        self.stop_agreed = False
        self.stop_signal: int | None = None
        self.step_grad_norm: Any = None  # before clipping, of the optimizer step under way
        self.nonfinite = NonFiniteGuard(self)
        self.train_order: Any = None  # the sampler of the training rows, whose epoch StepWatch sets
        self.train_loader: Any = None  # the loader of the training rows, where it is one of `PackingMixin`
        self.train_stream: Any = None  # the loader of streamed rows, whose position checkpoints hold
        self.eval_loaders: dict[int, Any] = {}  # by id of the dataset, kept while their workers are persistent
        super().__init__(*_args, **kwargs)
        self.add_callback(StepWatch(self))
        self._flops_per_token = flops_per_token(self.model)
        self._flos_per_token: int | None = None  # what `Trainer.floating_point_ops` counts
        self._peak_flops = peak_flops(self.args.device)
        self.is_set_up = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs` on the objects that watch training, with stored metrics, token counts and memory.

        Args:
            logs: metrics of this moment.
            start_time: when training started.
        """
        train_eval = "train" if "loss" in logs else "eval"
        if train_eval == "train":
            self._add_train_metrics(logs)
        if self.owns_loss and "train_loss" in logs and (mean := self.take_run_loss()) is not None:
            logs["train_loss"] = mean  # that of transformers knows nothing of the steps before a resume
        if self.args.include_tokens_per_second and "train_runtime" in logs:
            logs["train_tokens_per_second"] = round(self.num_tokens_this_session / logs["train_runtime"], 3)
        if "eval_loss" in logs:
            logs["eval_ppl"] = perplexity(logs["eval_loss"])
        for key, metric in self._stored_metrics.pop(train_eval, {}).items():
            logs[key] = REDUCTIONS[metric["reduction"]](metric["values"])
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`Trainer.evaluate`; the first one of a run finds out whether there is a metric to compare models by.

        Raises:
            ConfigError: `metric_for_best_model` names none.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        wanted = self.args.metric_for_best_model
        if self.is_in_train and metric_key_prefix == "eval" and wanted is not None:
            name = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
            if name not in metrics:
                raise ConfigError(
                    f"`metric_for_best_model: {wanted}`: evaluations of this run have no `{name}`. Write one of: "
                    f"{', '.join(sorted(key for key in metrics if key.startswith('eval_')))}."
                )
        return metrics

    def _add_train_metrics(self, logs: dict[str, float]) -> None:
        if self.owns_loss:
            window = self.take_window_loss()
            if window is None and self.nonfinite.num_skipped:
                window = math.nan  # every step of the window was left out
            logs["loss"] = logs["loss"] if window is None else window
            logs["ppl"] = perplexity(logs["loss"])
        seconds, seen, trained = self.take_window_tokens()
        if self.args.include_tkps and seconds > 0 and seen:
            per_gpu = max(1, self.args.world_size) * seconds
            logs["tokens/train_per_sec_per_gpu"] = round(trained / per_gpu, 2)
            logs["tokens/per_sec_per_gpu"] = round(seen / per_gpu, 2)
            if self._peak_flops:
                logs["mfu"] = round(seen / per_gpu * self._flops_per_token / self._peak_flops, 4)
        if self.nonfinite.num_skipped:
            logs["steps_skipped"] = self.nonfinite.num_skipped
        logs["tokens/total"] = self.num_tokens_seen
        logs["tokens/trainable"] = self.num_tokens_trained
        logs.update(memory_metrics(self.args.device))

    def store_metrics(
        self,
        metrics: dict[str, float] | dict[str, tuple[int | float, str]],
        train_eval: Literal["train", "eval"] = "train",
        reduction: Literal["mean", "min", "max", "sum"] = "mean",
    ) -> None:
        """Keep metrics until the next log line, which gets each of them reduced.

        Args:
            metrics: name -> value, or name -> (value, reduction).
            train_eval: with which log line they go.
            reduction: how several values of one name become one.
        """
        for key, value in metrics.items():
            value, how = value if isinstance(value, tuple) else (value, reduction)
            if how not in REDUCTIONS:
                raise ValueError(f"Unknown reduction {how!r} for metric {key!r}. One of: {', '.join(REDUCTIONS)}.")
            stored = self._stored_metrics[train_eval].setdefault(key, {"values": [], "reduction": how})
            stored["values"].append(value.item() if torch.is_tensor(value) else value)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """`Trainer.floating_point_ops`, which walks through all parameters for each micro-batch: milliseconds of a large model."""
        tokens = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if tokens is None or not tokens.numel():
            return super().floating_point_ops(inputs)
        if self._flos_per_token is None:
            self._flos_per_token = super().floating_point_ops(inputs) // tokens.numel()
        return self._flos_per_token * tokens.numel()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer._run_epoch`, unless the run is over: one that had ended and is resumed would take one more step."""
        if 0 < self.state.max_steps <= self.state.global_step:
            LOG.info(f"All {self.state.max_steps} steps are done: nothing is left to train.")
            self.control.should_training_stop = True
        if self.control.should_training_stop:
            return
        given = inspect.signature(Trainer._run_epoch).bind(self, *args, **kwargs).arguments
        is_resumed = given["epoch"] == given["epochs_trained"]
        done = given["steps_trained_in_current_epoch"] if is_resumed else 0
        with (
            quick_walks(given["model"]),
            self.loading_ahead(given["train_dataloader"], given["steps_in_epoch"] - done),
        ):
            super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer._get_grad_norm`, kept for `StepWatch`: callbacks are not given it."""
        self.step_grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self.step_grad_norm

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """`Trainer._maybe_log_save_evaluate`, with numbers that `StepWatch` has read: the GPU need not be waited for again."""
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            if self.args.world_size <= 1:
                on_host = torch.tensor(self.host_values.of(tr_loss), dtype=tr_loss.dtype)
                tr_loss -= tr_loss
                tr_loss = on_host
            if type(grad_norm) is torch.Tensor and grad_norm.numel() == 1:
                (grad_norm,) = self.host_values.of(grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer.create_model_card`, unless the run writes a card of its own (`writes_model_card` is False)."""
        if self.writes_model_card:
            super().create_model_card(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.push_to_hub`, with our tags and those of the datasets on the model card."""
        kwargs = sanitize_kwargs_for_tagging(self.tag_names, self.dataset_tags, kwargs)
        return super().push_to_hub(*args, **kwargs)
