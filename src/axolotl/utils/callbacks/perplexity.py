"""Perplexity of a model on texts, as an evaluation metric."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from axolotl.core.trainers.causal_loss import (
    IGNORE_INDEX,
    OutputHead,
    cross_entropy_of_logits,
    find_output_head,
    fused_loss,
    is_causal_lm,
    perplexity,
    probe_logit_formula,
)
from axolotl.core.trainers.utils import evaluation_mode
from axolotl.loaders.utils import plain_model


class Perplexity:
    """Perplexity in a sliding window, as in https://huggingface.co/docs/transformers/en/perplexity.

    Neither tokenizes references twice nor loads a model. Where head and loss of the model can be computed together, no more
    than one chunk of logits is in memory at a time.

    Args:
        tokenizer: tokenizer of the model.
        max_seq_len: tokens in a window.
        stride: tokens between the starts of two windows. Each token counts once, with at least `max_seq_len - stride`
            tokens of context where there are as many.

    Raises:
        ValueError: the windows would leave tokens out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, stride: int = 512):
        if stride < 1 or max_seq_len < 2:
            raise ValueError(f"Perplexity needs `max_seq_len` >= 2 and `stride` >= 1, not {max_seq_len} and {stride}.")
        self.name = "perplexity"
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        # A longer stride than the window would leave tokens out.
        self.stride = min(stride, max_seq_len)

    def compute(self, model: PreTrainedModel, references: list[str] | None = None) -> dict[str, float]:
        """Perplexity of the references.

        Args:
            model: a causal language model; runs in eval mode and is put back into its mode.
            references: texts. Each is scored on its own; token losses are averaged over all of them.

        Returns:
            `{"score": perplexity}`.

        Raises:
            ValueError: no references, or none has two tokens.
        """
        if not references:
            raise ValueError("Perplexity needs `references`: a list with at least one text.")
        total, count = self.sum_losses(model, references)
        if not count:
            raise ValueError("Perplexity needs a reference with at least two tokens.")
        return {"score": perplexity(total / count)}

    def sum_losses(self, model: PreTrainedModel, references: list[str]) -> tuple[float, int]:
        """Sum of the token losses of the references, and the number of tokens that were predicted."""
        total, count = 0.0, 0
        with evaluation_mode(model):
            head = _find_head(model)
            for text in references:
                text_total, text_count = self._score(model, head, text)
                total += text_total
                count += text_count
        return total, count

    def _score(self, model: PreTrainedModel, head: OutputHead | None, text: str) -> tuple[float, int]:
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        length, done, total, count = ids.shape[1], 1, 0.0, 0
        for start in range(0, length, self.stride):
            end = min(start + self.max_seq_len, length)
            # The first token of a window has nothing before it.
            first = max(done, start + 1)
            if first < end:
                labels = torch.full_like(ids[:, start:end], IGNORE_INDEX)
                labels[:, first - start - 1 : -1] = ids[:, first:end]
                total += _sum_of_losses(model, head, ids[:, start:end], labels)
                count += end - first
            done = end
            if end == length:
                break
        return total, count


def _find_head(model: PreTrainedModel) -> OutputHead | None:
    """The head of the model if its logits need not exist as a whole."""
    base = plain_model(model)
    if not is_causal_lm(base):
        return None
    found = find_output_head(base)
    if not isinstance(found, str):
        found = probe_logit_formula(model, base, found)
    return None if isinstance(found, str) else found


def _sum_of_losses(
    model: PreTrainedModel, head: OutputHead | None, ids_BT: torch.Tensor, labels_BT: torch.Tensor
) -> float:
    """Sum of the losses of one window. Labels are shifted: position t holds the token to predict at t."""
    if head is None:
        return cross_entropy_of_logits(model(input_ids=ids_BT).logits, labels_BT).double().item()
    with fused_loss(head, labels_BT, 1):
        return model(input_ids=ids_BT, labels=ids_BT).loss.double().item()
