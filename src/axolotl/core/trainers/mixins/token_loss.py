"""The loss of an optimizer step: sum of token losses over all micro-batches and ranks, over their number."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from transformers import ProcessorMixin

from axolotl.core.trainers.causal_loss import (
    OutputHead,
    count_supervised_tokens,
    cross_entropy_of_logits,
    find_output_head,
    fused_loss,
    is_causal_lm,
    mask_document_starts,
    probe_logit_formula,
    shift_labels,
)
from axolotl.core.trainers.gradient_sums import adds_gradients_at_once
from axolotl.core.trainers.mixins.step_batches import StepBatchesMixin
from axolotl.core.trainers.utils import HostValues, float64_device, kept_random_state
from axolotl.exceptions import ConfigError
from axolotl.kernels.cross_entropy import TokenLoss
from axolotl.loaders.utils import plain_model
from axolotl.monkeypatch.attention.layouts import identity, told_layouts
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


class TokenLossMixin(StepBatchesMixin):
    """Exact loss for training and evaluation of causal models, and the token counts that go with it.

    Other models (classification, encoder-decoder) and losses given as `compute_loss_func` go through `Trainer` unchanged.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        base = self._base_causal_model()
        self.is_causal_lm = is_causal_lm(base)
        self._is_of_transformers = type(base).__module__.startswith("transformers.")
        self.owns_loss = self.is_causal_lm and self.compute_loss_func is None
        if self.args.loss_entropy_top_k and not self.owns_loss:
            raise ConfigError(
                "`use_eaft: true` weighs the loss of the next token, and this model has another loss. Remove it."
            )
        self._output_head: OutputHead | str | None = None
        if not self.args.fused_linear_loss:
            self._output_head = "`fused_linear_loss` is off"
        # A model that does not take `num_items_in_batch` gets its loss computed here, from its logits.
        self._model_takes_num_items = self.model_accepts_loss_kwargs
        if self.owns_loss:
            self.model_accepts_loss_kwargs = True
        tokenizer = self.processing_class
        if isinstance(tokenizer, ProcessorMixin):
            tokenizer = tokenizer.tokenizer
        self._pad_token_id = None if tokenizer is None else tokenizer.pad_token_id
        # Sums over all ranks: tokens seen and tokens that carried loss, since the start of the run.
        self.num_tokens_seen = 0
        self.num_tokens_trained = 0
        self.num_tokens_this_session = 0  # seen since this process began, without those before a resume
        self.host_values = HostValues()  # read at the end of each optimizer step
        # Loss of the steps since the last log line (this rank's share), without and with the step under way.
        self._window_with_step = torch.zeros((), device=self.args.device)
        self.window_loss = torch.zeros((), device=self.args.device)
        self.window_steps = 0
        # Sum of the loss (over all ranks) and number of the steps before these, since the start of the run.
        self.run_loss = 0.0
        self.run_steps = 0
        # Wall time and tokens of these steps; the time of evaluations and saves is not in it.
        self._window_tokens = [0.0, 0, 0]
        self._eval_sums: torch.Tensor | None = None
        self._eval_counts_tokens = False

    def _base_causal_model(self) -> torch.nn.Module:
        return plain_model(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        alone = self.accelerator.distributed_type == DistributedType.NO
        unseen = type(self).compute_loss is TokenLossMixin.compute_loss  # another one may look at the gradients so far
        # At the first micro-batch of a step the GPU waits, and there are no gradients yet.
        at_once = adds_gradients_at_once(model) if alone and unseen and self.step_losses else nullcontext()
        with at_once, told_layouts(self._layouts):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_losses.append(loss)
        self.step_loss = self.step_loss + loss.to(self.step_loss.device)
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the loss of its optimizer step.

        Args:
            model: the model, wrapped as for training.
            inputs: the batch. First tokens of packed documents are masked here too, for callers of this method alone.
            return_outputs: also return the outputs of the model. With the fused loss their `logits` are a placeholder.
            num_items_in_batch: supervised tokens of the step over all ranks; None for those of this batch.
        """
        if not self.owns_loss or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        kept_S = self._kept_rows.pop(identity(inputs["labels"]), None)
        mask = inputs.get("attention_mask")
        if mask is not None and identity(mask) in self._full_masks:
            inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
        if kept_S is None:
            inputs = mask_document_starts(inputs)
        # Gradients and logged losses are averaged over ranks afterwards; a count over all ranks must undo that.
        scale = 1 if num_items_in_batch is None else self.accelerator.num_processes // self.get_tp_size()
        num_items = count_supervised_tokens(inputs).clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        wants_logits = return_outputs and not self._eval_counts_tokens
        head = self._output_head if wants_logits else self._find_output_head(model)
        labels_BT = shift_labels(inputs)
        kind = self._kind_of_loss(model)
        if isinstance(head, OutputHead) and not wants_logits:
            with fused_loss(head, labels_BT, num_items, self.args.loss_num_chunks, kind, kept_S):
                outputs = model(**inputs)
            loss = outputs["loss"]
        elif self._model_takes_num_items and kind == TokenLoss():
            outputs = model(**inputs, num_items_in_batch=num_items)
            loss = outputs["loss"]
        else:
            outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
            loss = cross_entropy_of_logits(outputs["logits"], labels_BT, kind) / num_items
            if outputs.get("aux_loss") is not None:
                loss = loss + self._base_causal_model().config.router_aux_loss_coef * outputs["aux_loss"]
        loss = self._weigh_router_loss(loss, outputs, inputs, num_items) * scale
        return (loss, outputs) if return_outputs else loss

    def _kind_of_loss(self, model: torch.nn.Module) -> TokenLoss:
        """What is learnt may be weighed; what is measured stays the plain loss."""
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        if not model.training:
            return TokenLoss(label_smoothing=smoothing)
        return TokenLoss(
            label_smoothing=smoothing,
            token_scaling=self.args.loss_token_scaling,
            entropy_top_k=self.args.loss_entropy_top_k,
            entropy_alpha=self.args.loss_entropy_alpha,
        )

    def _weigh_router_loss(
        self, loss: torch.Tensor, outputs: Any, inputs: dict[str, Any], num_items: Any
    ) -> torch.Tensor:
        """Models add a whole router loss per micro-batch; over a step it has to count once, by share of tokens."""
        aux_loss = outputs.get("aux_loss")
        if aux_loss is None:
            return loss
        share = count_supervised_tokens(inputs) / num_items
        coefficient = self._base_causal_model().config.router_aux_loss_coef
        return loss - coefficient * aux_loss.to(loss.device) * (1 - share)

    def _find_output_head(self, model: torch.nn.Module) -> OutputHead | str:
        """Decide once, at the first batch, whether head and loss run together."""
        if self._output_head is None:
            base = self._base_causal_model()
            found = find_output_head(base)
            if not isinstance(found, str):
                with self.compute_loss_context_manager():
                    found = probe_logit_formula(model, base, found)
            if isinstance(found, str):
                unchunked = ", so that `chunked_cross_entropy` has no effect" if self.args.loss_num_chunks else ""
                LOG.info(f"The loss is computed from full logits: {found}{unchunked}.")
            self._output_head = found
        return self._output_head

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """In an evaluation of the loss alone, add up token losses and counts instead of returning batch means."""
        if not (self.owns_loss and prediction_loss_only and self._eval_sums is not None and "labels" in inputs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = mask_document_starts(self._prepare_inputs(inputs))
        self._eval_counts_tokens = True
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                mean = self.compute_loss(model, inputs)
        finally:
            self._eval_counts_tokens = False
        count = count_supervised_tokens(inputs)
        self._eval_sums += torch.stack([mean.double() * count, count.double()]).to(self._eval_sums.device)
        return None, None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """`Trainer.evaluation_loop` with a loss that is the mean over the tokens of the whole set."""
        self._eval_sums = torch.zeros(2, dtype=torch.float64, device=float64_device(self.args.device))
        try:
            with kept_random_state():
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            sums = self._eval_sums
        finally:
            self._eval_sums = None
        if self.args.world_size > 1:
            sums = cast("torch.Tensor", self.accelerator.reduce(sums.to(self.args.device), reduction="sum"))
        total, count = sums.tolist()
        if count:
            assert output.metrics is not None
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    def numbers_of_step(self) -> list[torch.Tensor]:
        """What will be asked for when the step under way has ended. Sent to the host before the update, it need not wait for that."""
        self._window_with_step = self.window_loss + self.step_loss
        return [self._tr_loss, self._window_with_step, self._step_sums]

    def take_step_counts(self, *, with_loss: bool = True) -> None:
        """At the end of an optimizer step: add its counts to those of the run, and its loss unless it was left out."""
        if not self.owns_loss:
            return
        trained, seen = map(int, self.host_values.of(self._step_sums))
        self.num_tokens_trained += trained
        self.num_tokens_seen += seen
        self.num_tokens_this_session += seen
        if with_loss:
            self.window_loss = self._window_with_step
            self.window_steps += 1
        for index, value in enumerate((time.perf_counter() - self._step_began, seen, trained)):
            self._window_tokens[index] += value

    def take_window_tokens(self) -> tuple[float, int, int]:
        """Seconds, tokens and supervised tokens (over all ranks) of the steps since the last call."""
        seconds, seen, trained = self._window_tokens
        self._window_tokens = [0.0, 0, 0]
        return seconds, int(seen), int(trained)

    def take_window_loss(self) -> float | None:
        """Mean loss per step since the last call, over all ranks; None when no step was taken."""
        if not self.window_steps:
            return None
        total = self.window_loss
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total, reduction="mean")
        (value,) = self.host_values.of(total)
        self.run_loss += value
        mean = value / self.window_steps
        self.run_steps += self.window_steps
        self.window_loss, self.window_steps = torch.zeros_like(self.window_loss), 0
        self._window_with_step = self.step_loss  # which counts if this is asked within a step
        return mean

    def take_run_loss(self) -> float | None:
        """Mean loss per step of the whole run, with what it was before it was resumed; None when no step was taken."""
        self.take_window_loss()
        return self.run_loss / self.run_steps if self.run_steps else None
