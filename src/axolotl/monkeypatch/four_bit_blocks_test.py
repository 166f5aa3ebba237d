"""4-bit weights of any width on a CPU."""

from __future__ import annotations

import pytest
import torch

from axolotl.kernels.quantize import dequantize
from axolotl.monkeypatch.four_bit_blocks import replace_cpu_dequantization

functional = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("shape", [(64, 32), (48, 96), (8, 4304), (3, 33), (64, 128)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_layers_multiply_with_the_weights_that_were_packed(shape, quant_type, nested):
    replace_cpu_dequantization()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
    dense = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(dense, dequantize(packed, state), rtol=1e-5, atol=1e-6)
    assert (dense - weight).norm() < 0.2 * weight.norm()
