"""The operator of bitsandbytes that makes 4-bit weights dense, for CPUs: blocks go on across the ends of rows, as when they were made."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence

import torch


def dequantize_blocks(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Two numbers per byte of `packed`, the first in its high half, times the scale of their block: `shape`, in `dtype`."""
    from bitsandbytes.functional import get_4bit_type

    code = get_4bit_type(quant_type, device=packed.device)
    data = packed.reshape(-1).view(torch.uint8)
    count = math.prod(shape)
    halves = torch.stack((data >> 4, data & 15), dim=-1).reshape(-1)[:count].long()
    scales = absmax.reshape(-1).float().repeat_interleave(blocksize)[:count]
    return (code[halves] * scales).to(dtype).reshape(tuple(shape))


@functools.cache
def replace_cpu_dequantization() -> torch.library.Library:
    """Let `bitsandbytes::dequantize_4bit` run `dequantize_blocks` on CPUs, for good. The result keeps it so."""
    import bitsandbytes  # noqa: F401  # brings the operator

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced
        library.impl("dequantize_4bit", dequantize_blocks, "CPU", allow_override=True)
    return library
