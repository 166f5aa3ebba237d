from __future__ import annotations

import pytest
import torch

from axolotl.kernels.lora_sum import add_low_rank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("rows, size, rank", [(5, 7, 3), (5, 7, 0), (1, 8, 16), (0, 4, 2)])
def test_the_sum_is_that_of_fp64(rows, size, rank, with_residual, dtype):
    torch.manual_seed(0)
    wide = torch.randn(rows, size + 16).to(dtype)
    before = wide.clone()
    y, low, b = wide[:, :size], wide[:, size:][:, :rank], torch.randn(size, rank).to(dtype)
    residual = torch.randn(rows, size).to(dtype) if with_residual else None
    got = add_low_rank(y, low, b, residual)
    wanted = y.double() + low.double() @ b.double().T + (0 if residual is None else residual.double())
    assert got.dtype == dtype
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    got.zero_()
    torch.testing.assert_close(wide, before, rtol=0, atol=0)
