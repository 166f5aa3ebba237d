from __future__ import annotations

import pytest
import torch

from axolotl.kernels.lora_factors import factor_gradients


def rows_apart(rows: int, columns: int, room: int) -> torch.Tensor:
    """(rows, columns) inside a wider matrix, whose other columns are not numbers."""
    wide = torch.full((rows, columns + room), torch.nan, dtype=torch.float64)
    return wide[:, room // 2 : room // 2 + columns].normal_()


def reference(grad: torch.Tensor, b: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By autograd."""
    b, low = b.clone().requires_grad_(), low.clone().requires_grad_()
    grad_low, grad_b = torch.autograd.grad(torch.einsum("nr,or->no", low, b), (low, b), grad)
    return grad_low, grad_b


@pytest.mark.parametrize("rank", [0, 1, 3, 48])
@pytest.mark.parametrize(("rows", "columns"), [(7, 13), (1, 5), (5, 1), (0, 4)])
@pytest.mark.parametrize("room", [0, 5])
def test_both_gradients(rows, columns, rank, room):
    torch.manual_seed(0)
    grad, low = rows_apart(rows, columns, room), rows_apart(rows, rank, room)
    b = torch.randn(columns, rank, dtype=torch.float64)
    got = factor_gradients(grad, b, low)
    assert got[0].is_contiguous() and got[1].is_contiguous()
    for mine, wanted in zip(got, reference(grad, b, low), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_written_where_it_is_asked_for():
    torch.manual_seed(0)
    grad, low, b = rows_apart(6, 9, 4), rows_apart(6, 3, 2), torch.randn(9, 3, dtype=torch.float64)
    wide = torch.full((6, 8), 7.0, dtype=torch.float64)
    got, grad_b = factor_gradients(grad, b, low, wide[:, 2:5])
    wanted, wanted_b = reference(grad, b, low)
    assert got.data_ptr() == wide[:, 2:5].data_ptr()
    torch.testing.assert_close(wide[:, 2:5], wanted)
    torch.testing.assert_close(grad_b, wanted_b)
    assert (wide[:, :2] == 7.0).all() and (wide[:, 5:] == 7.0).all()


@pytest.mark.parametrize("blocks", [[(5, 2), (3, 2), (1, 2)], [(5, 2), (4, 0)], [(4, 1), (5, 3)]])
def test_blocks_along_the_diagonal(blocks):
    """The last column of b belongs to no block."""
    torch.manual_seed(0)
    within = torch.block_diag(*(torch.ones(block) for block in blocks)).double()
    within = torch.cat([within, within.new_zeros(9, 1)], 1)
    b = torch.randn_like(within) * within
    grad, low = rows_apart(6, 9, 4), rows_apart(6, b.shape[1], 2)
    got, grad_b = factor_gradients(grad, b, low, blocks=blocks)
    wanted, wanted_b = reference(grad, b, low)
    torch.testing.assert_close(got, wanted)
    assert not got[:, -1].any() and grad_b.isfinite().all()
    torch.testing.assert_close(grad_b * within, wanted_b * within)
