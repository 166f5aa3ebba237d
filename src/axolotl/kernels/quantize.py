"""Dequantization of the 4-bit weights of bitsandbytes (NF4 and FP4, with or without nested statistics).

A byte holds two weights, the first in its high half. A weight is `code[half byte] * absmax[its block]`; with nested
statistics (double quantization) `absmax` is itself `code2[byte] * absmax2[block of bytes] + offset`. See QLoRA,
https://arxiv.org/abs/2305.14314. On CUDA one Triton kernel does all of it in one pass over memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from axolotl.exceptions import ModelError
from axolotl.kernels.fp8 import Fp8State
from axolotl.kernels.utils import jit, num_programs, runs_triton, tl

# The sixteen values of NF4: quantiles of the normal distribution, scaled to [-1, 1] (appendix E of QLoRA).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_BLOCKS_PER_PROGRAM = 32


class _State(NamedTuple):
    """What a quantization state says, whichever its form."""

    absmax: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    code: torch.Tensor | None
    offset: torch.Tensor | None = None
    absmax2: torch.Tensor | None = None
    code2: torch.Tensor | None = None
    blocksize2: int = 1


def _read_state(state: Any) -> _State:
    """A `bitsandbytes.functional.QuantState`, or the list that older versions used in its place.

    The list is `[absmax, shape, dtype, blocksize, nested, quant_type, ...]`, where `nested` is None or
    `[offset, [absmax2, code2, blocksize2, ...]]` and `offset` a tensor.
    """
    if not isinstance(state, (list, tuple)):
        if getattr(state, "packing_format_for_cpu", False):
            raise ModelError(
                "These 4-bit weights are in the layout that bitsandbytes uses for inference on a CPU. Call `model.train()` "
                "and run the layer once, which restores the layout for training."
            )
        own = (state.absmax, torch.Size(state.shape), state.dtype, state.blocksize, state.code)
        nested = state.state2
        return (
            _State(*own) if nested is None else _State(*own, state.offset, nested.absmax, nested.code, nested.blocksize)
        )
    absmax, shape, dtype, blocksize, nested = state[:5]
    own = (absmax, torch.Size(shape), dtype, blocksize, None)
    if nested is None:
        return _State(*own)
    offset, inner = nested
    if isinstance(inner, (list, tuple)):
        return _State(*own, offset, inner[0], inner[1], inner[2])
    return _State(*own, offset, inner.absmax, inner.code, inner.blocksize)


@jit
def _dequantize_kernel(
    packed_ptr, out_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr,
    num_out, num_bytes, num_blocks, num_blocks2,
    HALF: tl.constexpr, BLOCKSIZE2: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """HALF: bytes per block. BLOCKS: blocks per program. Reads stay within the buffers whatever the state says."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    if NESTED:
        scale_code = tl.load(absmax_ptr + block, mask=block < num_blocks, other=0).to(tl.int32)
        outer_block = block // BLOCKSIZE2
        outer = tl.load(absmax2_ptr + outer_block, mask=outer_block < num_blocks2, other=0.0).to(tl.float32)
        scale = tl.load(code2_ptr + scale_code).to(tl.float32) * outer + tl.load(offset_ptr).to(tl.float32)
    else:
        scale = tl.load(absmax_ptr + block, mask=block < num_blocks, other=0.0).to(tl.float32)
    byte_at = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    byte = tl.load(packed_ptr + byte_at, mask=byte_at < num_bytes, other=0).to(tl.int32)
    first = tl.load(code_ptr + (byte >> 4)).to(tl.float32) * scale[:, None]
    second = tl.load(code_ptr + (byte & 15)).to(tl.float32) * scale[:, None]
    weights = tl.interleave(first, second)
    out_at = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_ptr + out_at, weights.to(out_ptr.dtype.element_ty), mask=out_at < num_out)


def _launch(packed: torch.Tensor, out: torch.Tensor, code: torch.Tensor, state: _State) -> None:
    nested = state.absmax2 is not None
    blocks = -(-out.numel() // state.blocksize)
    # A program handles about 2,048 weights whatever the size of a block.
    per_program = max(1, min(_BLOCKS_PER_PROGRAM, 2048 // state.blocksize))
    with torch.cuda.device(out.device):
        _dequantize_kernel[num_programs(blocks, per_program)](
            packed, out, state.absmax, code,
            state.absmax2 if nested else state.absmax,
            state.code2 if nested else code,
            state.offset if nested else state.absmax,
            out.numel(), packed.numel(), state.absmax.numel(), state.absmax2.numel() if nested else 0,
            HALF=state.blocksize // 2, BLOCKSIZE2=state.blocksize2, NESTED=nested, BLOCKS=per_program,
        )  # fmt: skip
    torch.autograd.graph.increment_version(out)


def _dequantize_torch(packed: torch.Tensor, code: torch.Tensor, state: _State, num_out: int) -> torch.Tensor:
    absmax = state.absmax.reshape(-1)
    if state.absmax2 is not None:
        assert state.code2 is not None and state.offset is not None
        outer = state.absmax2.reshape(-1).float().repeat_interleave(state.blocksize2)[: absmax.numel()]
        absmax = state.code2.reshape(-1).float()[absmax.long()] * outer + state.offset
    halves = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1)[:num_out].long()
    return code.reshape(-1).float()[halves] * absmax.float().repeat_interleave(state.blocksize)[:num_out]


def _write_dense(W: torch.Tensor, state: _State, out: torch.Tensor) -> torch.Tensor:
    """Fill `out` with the weights that W packs, and return it."""
    # The bytes in the order they lie in memory: a transposed view of packed weights is the same bytes.
    packed = (W.detach() if W.is_contiguous() else W.detach().t().contiguous()).reshape(-1).view(torch.uint8)
    code = state.code
    if code is None:
        code = torch.tensor(NF4, dtype=torch.float32, device=W.device)
    if runs_triton(packed, out):
        _launch(packed, out, code, state)
    else:
        out.copy_(_dequantize_torch(packed, code, state, out.numel()).reshape(state.shape))
    return out


def dequantize(W: torch.Tensor, quant_state: Any = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The dense weight behind 4-bit `W`.

    Args:
        W: packed weights of bitsandbytes, any storage dtype: (bytes, 1), or (1, bytes) for the transposed result.
        quant_state: the state of `W`, a `QuantState` or the list of older versions of bitsandbytes; None when `W` is dense.
        out: contiguous tensor of the state's shape and dtype to write to, or None for a new one.

    Returns:
        The weight in the state's shape and dtype, transposed when `W` is a row; `W` itself without a state.

    Raises:
        ModelError: `out` does not fit, or the state is in a layout for inference.
    """
    if quant_state is None:
        return W
    state = _read_state(quant_state)
    if out is None:
        out = torch.empty(state.shape, dtype=state.dtype, device=W.device)
    elif out.shape != state.shape or out.dtype != state.dtype or not out.is_contiguous():
        raise ModelError(
            f"`out` is {tuple(out.shape)} of {out.dtype}, but the weight is {tuple(state.shape)} of {state.dtype}. "
            "Give a contiguous tensor of that shape and dtype, or none."
        )
    _write_dense(W, state, out)
    return out.t() if W.dim() == 2 and W.shape[0] == 1 and W.shape[1] > 1 else out


NUM_STATE_TENSORS = 5


def split_state(quant_state: Any) -> tuple[list[torch.Tensor | None], list[int]]:
    """A quantization state as the tensors and numbers that an operator of PyTorch takes.

    Returns:
        `[absmax, code, offset, absmax2, code2]` and `[rows, columns, blocksize, blocksize2]`; all None and 0 without a state. In
        fp8 the tensors are those of `Fp8State`, and there are no blocks.
    """
    if quant_state is None:
        return [None] * NUM_STATE_TENSORS, [0] * 4
    if isinstance(quant_state, Fp8State):
        return [*quant_state, None, None], [quant_state.scale.shape[1], quant_state.transposed.shape[0], 0, 0]
    state = _read_state(quant_state)
    tensors = [state.absmax, state.code, state.offset, state.absmax2, state.code2]
    return tensors, [*state.shape, state.blocksize, state.blocksize2]


def dequantize_parts(
    packed: torch.Tensor,
    tensors: list[torch.Tensor | None],
    numbers: list[int],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dense weight (rows, columns) in `dtype`, from packed bytes and what `split_state` returns. `out` is contiguous."""
    absmax, code, offset, absmax2, code2 = tensors
    rows, columns, blocksize, blocksize2 = numbers
    assert absmax is not None, "a state has scales"
    state = _State(absmax, torch.Size((rows, columns)), dtype, blocksize, code, offset, absmax2, code2, blocksize2)
    return _write_dense(
        packed, state, torch.empty(state.shape, dtype=dtype, device=packed.device) if out is None else out
    )
