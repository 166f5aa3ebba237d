"""The collator that a config asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from axolotl.utils.collators.batching import (
    BatchSamplerDataCollatorForSeq2Seq,
    DataCollatorForSeq2Seq,
    PretrainingBatchSamplerDataCollatorForSeq2Seq,
    V2BatchSamplerDataCollatorForSeq2Seq,
)
from axolotl.utils.collators.layout import padded_length
from axolotl.utils.collators.mamba import MambaDataCollator
from axolotl.utils.dict import DictDefault
from axolotl.utils.samplers.geometry import is_varlen, packing_geometry

PAD_MULTIPLE = 64
"""Batches are padded to a multiple of this: tensor cores work on tiles, and fewer shapes mean fewer allocations."""

TAKES_BORDERS = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "axolotl_varlen")
"""Attention of transformers, or of ours, that reads `cu_seq_lens_*`; hub kernels of flash attention do too."""


def build_collator(
    cfg: DictDefault,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_eval: bool = False,
    model: Any = None,
    processor: Any = None,
) -> Callable[[Any], dict[str, Any]]:
    """The collator for training or evaluation of a causal model.

    Args:
        cfg: the packing, padding and attention keys are read.
        tokenizer: gives the pad token.
        is_eval: the evaluation set, which may be packed when training is not, and the other way round.
        model: the loaded model, which knows what attention it really uses; without it `attn_implementation` is believed.
        processor: the processor of a multimodal model; rows that are tokens need none.
    """
    del processor
    if cfg.model_config_type == "mamba":
        return MambaDataCollator(tokenizer)
    packed = is_packed(cfg, is_eval)
    padding = {"pad_to_multiple_of": pad_multiple(cfg, is_eval, packed)}
    borders = _takes_borders(cfg, model)
    if packed and cfg.pretraining_dataset:
        attend_apart = cfg.pretrain_multipack_attn is not False
        return PretrainingBatchSamplerDataCollatorForSeq2Seq(
            tokenizer, multipack_attn=attend_apart, varlen=borders, drop_attention_mask=True, **padding
        )
    if packed:
        return V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, varlen=borders, drop_attention_mask=True, **padding)
    if _flattens(cfg, is_eval):
        return BatchSamplerDataCollatorForSeq2Seq(tokenizer, padding=False, varlen=borders, drop_attention_mask=True)
    return DataCollatorForSeq2Seq(tokenizer, **padding)


def is_packed(cfg: DictDefault, is_eval: bool) -> bool:
    """Whether batches are packed. Evaluation follows training unless `eval_sample_packing` says otherwise."""
    if is_eval and cfg.eval_sample_packing is not None:
        return bool(cfg.eval_sample_packing)
    return bool(cfg.sample_packing)


def pad_multiple(cfg: DictDefault, is_eval: bool, packed: bool) -> int | None:
    """The multiple that rows are padded to; with `pad_to_sequence_len: true` all rows get the full length."""
    if cfg.pad_to_multiple_of:
        return int(cfg.pad_to_multiple_of)
    if cfg.pad_to_sequence_len:
        full = (cfg.eval_sequence_len if is_eval else None) or cfg.sequence_len or 512
        if packed:
            full = packing_geometry(cfg, is_eval).row_length
        return padded_length(int(full), PAD_MULTIPLE)
    return PAD_MULTIPLE if cfg.pad_to_sequence_len is None else None


def _takes_borders(cfg: DictDefault, model: Any) -> bool:
    config = getattr(model, "config", None)
    if config is None:
        return is_varlen(cfg) and cfg.attn_implementation != "flex_attention"
    used = str(getattr(config, "_attn_implementation", None))
    return used in TAKES_BORDERS or ("/" in used and "flash" in used)


def _flattens(cfg: DictDefault, is_eval: bool) -> bool:
    size = (cfg.eval_batch_size if is_eval else None) or cfg.micro_batch_size or 1
    if cfg.batch_flattening == "auto":
        return is_varlen(cfg) and int(size) > 1
    return bool(cfg.batch_flattening)
