"""How many bins of which size a packed batch holds, and how they are laid out."""

from __future__ import annotations

from dataclasses import dataclass

from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.validation.common import VARLEN_BACKENDS

VARLEN_ATTENTION = VARLEN_BACKENDS | {"axolotl_varlen"}
"""Values of `attn_implementation` with which one long row of documents costs no more than several short rows."""


@dataclass(frozen=True)
class PackingGeometry:
    """The bins of a micro-batch.

    Attributes:
        num_rows: bins per micro-batch.
        capacity: tokens per bin.
        one_row: the bins of a micro-batch are laid end to end in one row.
    """

    num_rows: int
    capacity: int
    one_row: bool = False

    @property
    def row_length(self) -> int:
        """Tokens that a row of the batch holds at most."""
        return self.num_rows * self.capacity if self.one_row else self.capacity


def packing_geometry(cfg: DictDefault, is_eval: bool = False) -> PackingGeometry:
    """`micro_batch_size` bins of `sequence_len` tokens, in one row where attention works by document borders; otherwise
    each is a row, as a mask over one long row would cost the square of its length.

    A bin never grows with the micro-batch: a step would else train other rows when the same global batch is split
    otherwise into micro-batches and accumulation. `multipack_real_batches: true` asks for rows. Evaluation takes
    `eval_batch_size` and `eval_sequence_len`.
    """
    return PackingGeometry(
        num_rows=int((cfg.eval_batch_size if is_eval else None) or cfg.micro_batch_size or 1),
        capacity=int((cfg.eval_sequence_len if is_eval else None) or cfg.sequence_len or 512),
        one_row=is_varlen(cfg) and not cfg.multipack_real_batches,
    )


def is_varlen(cfg: DictDefault) -> bool:
    """Whether the attention asked for works by document borders."""
    name = (cfg.attn_implementation or "").partition("@")[0].partition(":")[0]
    return name in VARLEN_ATTENTION or bool(cfg.flash_attention)
