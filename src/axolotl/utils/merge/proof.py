"""Proof that a merged model answers as base plus adapter do.

The logits of both are computed on the same token rows, one model in memory at a time, and compared. The reference is
PEFT's unmerged forward over the base as it was loaded in training, so nothing of the merge is trusted.
"""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from axolotl.loaders.adapter_init import load_trained
from axolotl.loaders.quantization import keep_4bit_layout
from axolotl.utils.merge.four_bit import EightBit, FourBit

NUM_ROWS, ROW_LENGTH = 2, 32
# Largest accepted RMS of the logit difference over the RMS of the (centred) logits. float32: rounding of sums;
# half types: rounding of the written weights (2^-11, 2^-8 relative), grown through some hundred layers.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class LogitProof:
    """How far the merged model's logits are from those of base plus adapter.

    Args:
        max_abs: largest difference of two logits.
        relative: RMS of the difference over RMS of the centred logits.
        kl: mean KL divergence, in nats, of the merged model's next-token distribution from the adapter's.
        kl_base: the same for the base model without adapter: what a merge that changed nothing would score; None if the
            vocabularies differ.
        tolerance: largest accepted `relative`.
        dtype: dtype of the forward passes.
    """

    max_abs: float
    relative: float
    kl: float
    kl_base: float | None
    tolerance: float
    dtype: torch.dtype

    @property
    def holds(self) -> bool:
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        base = "" if self.kl_base is None else f" (base model without adapter: {self.kl_base:.2e})"
        return (
            f"logits of {NUM_ROWS} x {ROW_LENGTH} tokens in {str(self.dtype).removeprefix('torch.')}: largest difference "
            f"{self.max_abs:.2e}, relative {self.relative:.2e} (accepted {self.tolerance:.0e}), KL {self.kl:.2e} nats{base}"
        )


def dtype_that_fits(num_params: int, stored: torch.dtype) -> torch.dtype | None:
    """The dtype to compare whole models in: float32, else as stored, else None when free memory holds neither."""
    free = psutil.virtual_memory().available * 0.8
    for dtype in (torch.float32, stored):
        if num_params * dtype.itemsize * 1.2 < free:
            return dtype
    return None


@dataclass(frozen=True)
class TrainedBase:
    """The base model as it was while its adapter was trained.

    Args:
        model_class: the class that loads it.
        folder: its files.
        config: of the trained model; its vocabulary is the one the adapter was trained with.
        num_rows: rows of its embedding, below which all token ids of the comparison are drawn.
        trained_on: how it was quantized in training, when the merge reproduces that.
        rounded: its quantized weights, which the reference has rounded, too; but not the rounded inputs that go with 8 bits.
        trust_remote_code: whether its code may run.
    """

    model_class: Any
    folder: Path
    config: PretrainedConfig
    num_rows: int
    trained_on: FourBit | EightBit | None = None
    rounded: Collection[str] = ()
    trust_remote_code: bool = False

    def load(self, dtype: torch.dtype) -> Any:
        """The model, to compute in `dtype`."""
        model = self.model_class.from_pretrained(self.folder, dtype=dtype, trust_remote_code=self.trust_remote_code)
        if self.trained_on is not None:
            # Not with the layers of bitsandbytes, which a CPU runs by other numbers than a GPU does: see `four_bit`.
            for name in self.rounded:
                weight = model.get_parameter(name)
                weight.data.copy_(self.trained_on.round_trip(weight.data))
        keep_4bit_layout(model)
        return model


def compare_logits(
    base: TrainedBase, adapter: Path, merged: Path, *, dtype: torch.dtype, written: torch.dtype
) -> LogitProof:
    """Compare logits on seeded random token rows.

    Args:
        base: what the adapter was trained on.
        adapter: folder of the adapter.
        merged: folder of the merged model.
        dtype: dtype of the forward passes.
        written: dtype of the merged weights.
    """
    rows = torch.randint(base.num_rows, (NUM_ROWS, ROW_LENGTH), generator=torch.Generator().manual_seed(0))
    model = base.load(dtype)
    vocab_size = base.config.get_text_config().vocab_size
    plain = None
    if model.get_input_embeddings().weight.shape[0] != vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=True)
    else:
        plain = _log_probs(_logits(model, rows))
    expected = _logits(load_trained(model, adapter), rows)
    del model
    gc.collect()
    got = _logits(base.model_class.from_pretrained(merged, dtype=dtype, trust_remote_code=base.trust_remote_code), rows)
    gc.collect()
    shared = min(expected.shape[-1], got.shape[-1], base.num_rows)
    expected, got = expected[..., :shared], got[..., :shared]
    difference = got - expected
    centred = expected - expected.mean()
    reference = _log_probs(expected)
    tolerances = [TOLERANCES[dtype], TOLERANCES[written]]
    if isinstance(base.trained_on, FourBit):
        tolerances.append(TOLERANCES[torch.bfloat16])
    return LogitProof(
        max_abs=difference.abs().max().item(),
        relative=(difference.pow(2).mean() / centred.pow(2).mean()).sqrt().item(),
        kl=_kl(reference, _log_probs(got)),
        kl_base=None if plain is None or plain.shape != reference.shape else _kl(reference, plain),
        tolerance=max(tolerances),
        dtype=dtype,
    )


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel, rows: torch.Tensor) -> torch.Tensor:
    output = model.eval()(input_ids=rows.to(model.device))
    return output.logits.float().cpu()


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, dim=-1)


def _kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    return (reference.exp() * (reference - other)).sum(-1).mean().item()
