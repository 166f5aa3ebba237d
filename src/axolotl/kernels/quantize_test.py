"""4-bit dequantization against bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from axolotl.exceptions import ModelError
from axolotl.kernels.quantize import NF4, dequantize

bnb = pytest.importorskip("bitsandbytes.functional")


def quantize(shape=(48, 64), *, kind="nf4", nested=True, blocksize=64, dtype=torch.float32, storage=torch.uint8):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind, quant_storage=storage
    )
    return packed, state


def legacy(state):
    """The list that older versions of bitsandbytes kept."""
    nested = None
    if state.nested:
        inner = state.state2
        nested = [state.offset, [inner.absmax, inner.code, inner.blocksize, inner.nested, inner.dtype, None, None]]
    return [state.absmax, state.shape, state.dtype, state.blocksize, nested, state.quant_type, state.code]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_bitsandbytes(kind, nested, blocksize, dtype):
    # Rows as long as a block: bitsandbytes on a CPU is wrong where a block spans rows.
    packed, state = quantize((24, 128), kind=kind, nested=nested, blocksize=blocksize, dtype=dtype)
    got = dequantize(packed, state)
    assert got.shape == state.shape and got.dtype == dtype
    torch.testing.assert_close(got, bnb.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 64), (3, 7), (5, 33), (65, 64)])
def test_sizes_that_do_not_fill_their_last_block(shape):
    packed, state = quantize(shape)
    torch.testing.assert_close(dequantize(packed, state), bnb.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_list_of_older_versions(nested):
    packed, state = quantize(nested=nested)
    assert torch.equal(dequantize(packed, legacy(state)), dequantize(packed, state))


def test_own_table_is_that_of_bitsandbytes():
    assert quantize()[1].code.tolist() == pytest.approx(NF4, abs=1e-7)


def test_packed_in_another_dtype():
    packed, state = quantize(storage=torch.bfloat16)
    plain, plain_state = quantize()
    assert packed.dtype == torch.bfloat16
    assert torch.equal(dequantize(packed, state), dequantize(plain, plain_state))


def test_a_row_gives_the_transposed_weight():
    packed, state = quantize()
    assert torch.equal(dequantize(packed.t(), state), dequantize(packed, state).t())


def test_blocks_that_span_rows():
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(weight, blocksize=256, quant_type="nf4")
    assert (dequantize(packed, state) - weight).norm() < 0.11 * weight.norm()


def test_without_a_state_nothing_happens():
    weight = torch.randn(3, 4)
    assert dequantize(weight) is weight


def test_out_is_written_and_checked():
    packed, state = quantize()
    out = torch.empty(state.shape, dtype=state.dtype)
    assert dequantize(packed, state, out=out) is out
    assert torch.equal(out, dequantize(packed, state))
    with pytest.raises(ModelError, match="`out` is"):
        dequantize(packed, state, out=torch.empty(2, 2))
    with pytest.raises(ModelError, match="`out` is"):
        dequantize(packed, state, out=out.half())
