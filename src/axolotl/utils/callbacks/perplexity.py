"""Callback to calculate perplexity as an evaluation metric."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Perplexity:
    """Perplexity in a sliding window, as in https://huggingface.co/docs/transformers/en/perplexity.

    Neither tokenizes references twice nor loads a model.

    Args:
        tokenizer: tokenizer of the model.
        max_seq_len: tokens in a window.
        stride: tokens between the starts of two windows. Each token counts once, with at least `max_seq_len - stride`
            tokens of context where there are as many.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, stride: int = 512):
        self.name = "perplexity"
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.stride = stride

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
        was_training = model.training
        model.eval()
        total, count = 0.0, 0
        try:
            with torch.no_grad():
                for text in references:
                    text_total, text_count = self._score(model, text)
                    total += text_total
                    count += text_count
        finally:
            model.train(was_training)
        if not count:
            raise ValueError("Perplexity needs a reference with at least two tokens.")
        return {"score": float(torch.exp(torch.tensor(total / count, dtype=torch.float64)))}

    def _score(self, model: PreTrainedModel, text: str) -> tuple[float, int]:
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        length, done, total, count = ids.shape[1], 1, 0.0, 0
        for start in range(0, length, self.stride):
            end = min(start + self.max_seq_len, length)
            window = ids[:, start:end]
            new = end - done
            if new > 0 and window.shape[1] > 1:
                logits = model(input_ids=window).logits[0, :-1].float()
                losses = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
                total += losses[-new:].double().sum().item()
                count += min(new, losses.numel())
                done = end
            if end == length:
                break
        return total, count
