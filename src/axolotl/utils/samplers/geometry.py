"""How many packed rows of which size a batch holds."""

from __future__ import annotations

from dataclasses import dataclass

from axolotl.utils.dict import DictDefault

VARLEN_ATTENTION = frozenset(
    [
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "flash_attention_torch",
        "axolotl_varlen",
        "flex_attention",
        "xformers",
        "sage",
        "kernels-community/flash-attn2",
        "kernels-community/flash-attn3",
        "kernels-community/sage-attention",
    ]
)
"""Values of `attn_implementation` with which one long row of documents costs no more than several short rows."""


@dataclass(frozen=True)
class PackingGeometry:
    """Rows of a packed batch.

    Attributes:
        num_rows: packed rows per micro-batch.
        capacity: tokens per packed row.
    """

    num_rows: int
    capacity: int


def packing_geometry(cfg: DictDefault, is_eval: bool = False) -> PackingGeometry:
    """One row of `micro_batch_size * sequence_len` tokens where attention works by document borders, otherwise
    `micro_batch_size` rows of `sequence_len`: a mask over one long row would cost the square of its length.

    `multipack_real_batches: true` asks for rows. Evaluation takes `eval_batch_size` and `eval_sequence_len`.
    """
    rows = int((cfg.eval_batch_size if is_eval else None) or cfg.micro_batch_size or 1)
    tokens = int((cfg.eval_sequence_len if is_eval else None) or cfg.sequence_len or 512)
    if is_varlen(cfg) and not cfg.multipack_real_batches:
        return PackingGeometry(num_rows=1, capacity=rows * tokens)
    return PackingGeometry(num_rows=rows, capacity=tokens)


def is_varlen(cfg: DictDefault) -> bool:
    """Whether the attention asked for works by document borders."""
    name = (cfg.attn_implementation or "").partition("@")[0].partition(":")[0]
    return name in VARLEN_ATTENTION or bool(cfg.flash_attention)
