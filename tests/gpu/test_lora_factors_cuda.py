"""The kernels of low-rank terms, of the gradients of their factors, and of the activations beside them, on CUDA against fp64."""

from __future__ import annotations

import pytest
import torch

from axolotl.kernels import lora_factors, lora_glu, lora_sum
from axolotl.kernels.lora_factors import FactorTile, factor_gradients, scale_rows, sum_rows
from axolotl.kernels.lora_glu import lora_gated_backward, lora_gated_forward
from axolotl.kernels.lora_sum import add_low_rank

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12))


def rows_apart(rows: int, columns: int, room: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, columns) inside a wider matrix, whose other columns are not numbers."""
    wide = torch.full((rows, columns + room), torch.nan, device="cuda", dtype=dtype)
    return wide[:, room // 2 : room // 2 + columns].normal_()


@pytest.fixture
def fused(monkeypatch) -> list[int]:
    """The ranks that the kernel of `factor_gradients` was launched for."""
    done, launch = [], lora_factors._launch
    monkeypatch.setattr(lora_factors, "_launch", lambda *args: done.append(args[-1]) or launch(*args))
    return done


@pytest.mark.parametrize(
    ("rows", "columns", "room", "rank", "dtype"),
    [
        (1, 1, 0, 1, torch.bfloat16),
        (77, 200, 16, 3, torch.float16),
        (77, 203, 5, 17, torch.bfloat16),
        (1000, 1544, 48, 16, torch.bfloat16),
        (1000, 1544, 48, 32, torch.bfloat16),
        (9000, 520, 0, 8, torch.bfloat16),
        (77, 200, 16, 48, torch.bfloat16),
        (77, 200, 16, 0, torch.bfloat16),
        (0, 64, 0, 16, torch.bfloat16),
    ],
)
def test_factor_gradients(rows, columns, room, rank, dtype, fused):
    torch.manual_seed(0)
    grad, low = rows_apart(rows, columns, room, dtype), rows_apart(rows, rank, room, dtype)
    b = torch.randn(columns, rank, device="cuda").to(dtype)
    wide = torch.full((rows, rank + 9), 7.0, device="cuda", dtype=dtype)
    got = factor_gradients(grad, b, low, wide[:, 4 : 4 + rank])
    assert fused == ([rank] if rows and 0 < rank <= max(lora_factors.TILES) else [])
    assert got[0].data_ptr() == wide[:, 4 : 4 + rank].data_ptr()
    assert (wide[:, :4] == 7.0).all() and (wide[:, 4 + rank :] == 7.0).all()
    for mine, wanted in zip(got, (grad.double() @ b.double(), grad.double().T @ low.double()), strict=True):
        assert mine.dtype == dtype and mine.shape == wanted.shape
        # Beyond the highest rank cuBLAS forms them, which may round its partial sums.
        assert error(mine, wanted) < (1 if fused else 2) * torch.finfo(dtype).eps
    for mine, again in zip(got, factor_gradients(grad, b, low), strict=True):
        assert torch.equal(mine, again)


@pytest.mark.parametrize("tile", [None, FactorTile(64, 128, 7, 4, 3), FactorTile(16, 64, 40, 4, 2)])
@pytest.mark.parametrize(
    ("heights", "rank", "room"),
    [
        ((4096, 1024, 1024), 16, 0),
        ((896, 128, 128), 16, 0),
        ((1000, 60, 41), 8, 8),
        ((70, 70), 3, 10),
        ((515,), 16, 16),
    ],
)
def test_factor_gradients_of_blocks(heights, rank, room, tile, fused, monkeypatch):
    """The last `room` columns of b belong to no block."""
    if tile is not None:
        monkeypatch.setattr(lora_factors, "TILES", {32: tile})
    torch.manual_seed(0)
    rows, columns, width = 333, sum(heights), rank * len(heights) + room
    within = torch.zeros(columns, width, device="cuda", dtype=torch.float64)
    within[:, : width - room] = torch.block_diag(*(torch.ones(height, rank) for height in heights))
    b = (torch.randn_like(within) * within).bfloat16()
    wide = rows_apart(rows, columns + width, 0, torch.bfloat16)
    grad, grad_low, low = wide[:, :columns], wide[:, columns:], rows_apart(rows, width, 0, torch.bfloat16)
    wanted_low, wanted_b = grad.double() @ b.double(), grad.double().T @ low.double() * within
    blocks = [(height, rank) for height in heights]
    _, grad_b = factor_gradients(grad, b, low, grad_low, blocks)
    assert fused == [rank] and grad_b.isfinite().all()
    used = width - room
    assert error(grad_low[:, :used], wanted_low[:, :used]) < 8e-3 and not grad_low[:, used:].any()
    assert error(grad_b * within, wanted_b) < 8e-3
    again, again_b = factor_gradients(grad, b, low, None, blocks)
    assert torch.equal(again, grad_low) and torch.equal(again_b * within, grad_b * within)


def test_factor_gradients_of_unequal_blocks(fused):
    torch.manual_seed(0)
    b = torch.block_diag(torch.randn(64, 16), torch.zeros(32, 0), torch.randn(32, 8)).cuda().bfloat16()
    grad, low = rows_apart(99, 128, 8, torch.bfloat16), rows_apart(99, 24, 8, torch.bfloat16)
    grad_low, grad_b = factor_gradients(grad, b, low, blocks=[(64, 16), (32, 0), (32, 8)])
    assert fused == [24]
    assert error(grad_low, grad.double() @ b.double()) < 8e-3
    assert error(grad_b, grad.double().T @ low.double()) < 8e-3


def test_factor_gradients_of_rows_beyond_32_bits():
    rows, width = 2**31 // 8192 + 70, 8192
    grad = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)[:, :512]
    grad[-70:] = 1.0
    b, low = torch.ones(512, 16, device="cuda").bfloat16(), torch.ones(rows, width, device="cuda").bfloat16()[:, -16:]
    grad_low = torch.full((rows, width), 3.0, device="cuda", dtype=torch.bfloat16)[:, :16]
    _, grad_b = factor_gradients(grad, b, low, grad_low)
    assert (grad_low[-70:] == 512.0).all() and not grad_low[:-70].any()
    assert (grad_b == 70.0).all()


@pytest.mark.parametrize("sizes", [(14336 * 16, 14336 * 16, 16 * 14336), (5, 0, 1000)])
@pytest.mark.parametrize("parts", [0, 1, 19])
def test_sums_of_rows(sizes, parts):
    torch.manual_seed(0)
    sums = torch.randn(parts, sum(sizes), device="cuda")
    pieces = [torch.full((size,), torch.nan, device="cuda", dtype=torch.bfloat16) for size in sizes]
    sum_rows(sums, pieces)
    assert error(torch.cat(pieces), sums.double().sum(0)) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("rows", "size", "room", "ranks", "dtype"),
    [
        (1, 8, 0, (16, 16, 16), torch.bfloat16),
        (77, 130, 3, (3, 0, 16), torch.float16),
        (77, 130, 3, (0, 5, 0), torch.bfloat16),
        (1030, 512, 0, (16, 16, 16), torch.bfloat16),
        (1030, 512, 0, (0, 0, 0), torch.bfloat16),
        (1030, 512, 0, (17, 32, 0), torch.bfloat16),
        (8200, 336, 16, (32, 16, 48), torch.bfloat16),
        (8200, 336, 16, (64, 128, 1), torch.bfloat16),
    ],
)
def test_gradients_of_low_rank_inputs_and_factors(rows, size, room, ranks, dtype):
    torch.manual_seed(0)
    used = 2 * size + ranks[0] + ranks[1]
    gul = torch.randn(rows, used + room, device="cuda").to(dtype)
    gul[:, used:] = torch.nan
    b_gate, b_up = ((torch.randn(size, rank, device="cuda") * 0.3).to(dtype) for rank in ranks[:2])
    a = (torch.randn(ranks[2], size, device="cuda") * 0.3).to(dtype)
    grad, grad_low = (torch.randn(rows, width, device="cuda").to(dtype) for width in (size, ranks[2]))
    wide = [tensor.double() for tensor in (grad, gul, b_gate, b_up, grad_low, a)]
    wanted_h = lora_gated_forward(*wide[1:4], "silu")
    wanted = lora_gated_backward(*wide, "silu")
    assert error(lora_gated_forward(gul, b_gate, b_up, "silu"), wanted_h) < torch.finfo(dtype).eps
    runs = [lora_gated_backward(grad.clone(), gul, b_gate, b_up, grad_low, a, "silu") for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    got = runs[0]
    assert not got.gul[:, used:].any()
    pieces = [*zip(got[1:], wanted[1:], strict=True)]
    sizes = [size, size, ranks[0], ranks[1], room]
    pieces += zip(got.gul.split(sizes, 1)[:4], wanted.gul.split(sizes, 1)[:4], strict=True)
    for mine, reference in pieces:
        assert mine.dtype == dtype and mine.shape == reference.shape
        assert error(mine, reference) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rows", [100, 5000, 9001])
def test_every_tile_of_the_gradients_of_low_rank_inputs(rows):
    torch.manual_seed(0)
    grad_gul = torch.randn(rows, 2 * 200 + 40, device="cuda").bfloat16()
    b_gate, b_up = torch.randn(200, 16, device="cuda").bfloat16(), torch.randn(200, 8, device="cuda").bfloat16()
    kept = grad_gul[:, :400].clone()
    lora_glu._multiply_back(grad_gul, b_gate, b_up)
    assert torch.equal(grad_gul[:, :400], kept) and not grad_gul[:, 424:].any()
    assert error(grad_gul[:, 400:416], kept[:, :200].double() @ b_gate.double()) < 8e-3
    assert error(grad_gul[:, 416:424], kept[:, 200:].double() @ b_up.double()) < 8e-3


def test_gated_rows_beyond_32_bits():
    size, rank = 496, 16
    width = 2 * size + 2 * rank
    rows = 2**31 // width + 70
    gul = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    b = torch.full((size, rank), 0.5, device="cuda", dtype=torch.bfloat16)
    gul[-70:, 2 * size :] = 1.0  # gate and up are 8 there
    none = gul.new_zeros(rows, 0), b.new_zeros(0, size)
    h = lora_gated_forward(gul, b, b, "silu")
    assert not h[:-70].any() and ((h[-70:].float() - 64.0).abs() < 0.5).all()
    grad = torch.zeros_like(h)
    grad[-70:] = 1.0
    got = lora_gated_backward(grad, gul, b, b, *none, "silu")
    assert not got.gul[:-70].any()
    assert ((got.gul[-70:, size : 2 * size].float() - 8.0).abs() < 0.1).all()
    assert ((got.gul[-70:, 2 * size + rank :].float() / (8.0 * 0.5 * size) - 1.0).abs() < 0.02).all()
    assert ((got.b_up.float() / (8.0 * 70) - 1.0).abs() < 0.02).all()


@pytest.mark.parametrize(
    ("rows", "size", "rank", "with_residual", "dtype"),
    [
        (2100, 200, 16, True, torch.bfloat16),
        (2100, 200, 16, False, torch.bfloat16),
        (257, 130, 17, True, torch.float16),
        (257, 130, 1, True, torch.bfloat16),
        (64, 4096, 100, True, torch.bfloat16),
        (64, 4096, 128, False, torch.bfloat16),
        (64, 4096, 160, True, torch.bfloat16),
        (1, 24, 0, True, torch.bfloat16),
        (0, 64, 16, True, torch.bfloat16),
    ],
)
def test_added_low_rank(rows, size, rank, with_residual, dtype):
    torch.manual_seed(0)
    wide = rows_apart(rows, size + -(-rank // 16) * 16, 0, dtype)
    wide[:, size + rank :] = torch.nan  # nobody reads what is left of the low-rank columns
    y, low = wide[:, :size], wide[:, size : size + rank]
    b = (torch.randn(size, rank, device="cuda") * 0.3).to(dtype)
    residual = torch.randn(rows, size, device="cuda").to(dtype) if with_residual else None
    assert lora_sum._fits(y, low, b, residual) == (rank <= 128)
    kept = torch.empty(rows, rank, device="cuda", dtype=dtype)
    got = add_low_rank(y, low, b, residual, kept)
    assert torch.equal(kept, low)
    wanted = y.double() + low.double() @ b.double().T + (0 if residual is None else residual.double())
    assert got.shape == (rows, size) and got.is_contiguous() and got.dtype == dtype
    assert error(got, wanted) < torch.finfo(dtype).eps
    if rank <= 128:  # rounded once
        torch.testing.assert_close(got.double(), wanted, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize(("rows", "rank", "room"), [(8192, 48, 32), (77, 3, 5), (1, 1, 0), (0, 16, 0)])
def test_scaled_rows(rows, rank, room):
    torch.manual_seed(0)
    low, scale = rows_apart(rows, rank, room, torch.bfloat16), torch.rand(rows, 1, device="cuda") * 3
    assert torch.equal(scale_rows(low, scale), (low.float() * scale).bfloat16())
