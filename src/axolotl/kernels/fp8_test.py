from __future__ import annotations

import pytest
import torch
from torch import nn

from axolotl.kernels.fp8 import FP8, matmul_fp8, quantize_rows, to_fp8
from axolotl.kernels.lora_ops import mlp_in_graph, project_in_graph


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm())


def test_rows_keep_their_values_beside_an_outlier():
    torch.manual_seed(0)
    x = torch.randn(6, 32)
    x[2, 5] = 1e4
    x[3] = 0.0
    data, scale = quantize_rows(x)
    assert data.dtype == FP8 and scale.shape == (6, 1)
    back = data.float() * scale
    others = [0, 1, 4, 5]
    # e4m3 has three bits behind the point: half a step of the last is 1/16.
    assert ((back - x).abs()[others] <= x.abs()[others] / 16 + scale[others] * 2**-10).all()
    assert back[2, 5] == pytest.approx(1e4) and not back[3].any()


def make_linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    return linear.requires_grad_(False)


def test_product_is_that_of_the_weights():
    torch.manual_seed(0)
    linear = make_linear(64, 48)
    weight, x = linear.weight.detach().clone(), torch.randn(10, 64)
    (quantized,) = to_fp8([linear])
    y = matmul_fp8(*quantize_rows(x), quantized.weight, quantized.weight.fp8_state.scale, torch.float32)
    assert far(y, x @ weight.T) < 0.05
    assert far(quantized(x), x @ weight.T) < 0.04
    assert linear.weight.numel() == 0


def read(quantized, rank: int = 4):
    A = torch.randn(rank, quantized.in_features, requires_grad=True)
    B = torch.randn(quantized.out_features, rank, requires_grad=True)
    return quantized.weight, quantized.bias, quantized.weight.fp8_state, A, B, 0.1


@pytest.mark.parametrize("need_x", [True, False])
def test_operators_compute_with_weights_in_fp8(need_x):
    torch.manual_seed(0)
    q, k, gate, up, down = (
        make_linear(64, 48, bias=True),
        make_linear(64, 32),
        *(make_linear(64, 96) for _ in "gu"),
        make_linear(96, 64),
    )
    dense = [linear.weight.detach().clone() for linear in (q, k, gate, up, down)]
    bias = q.bias.detach().clone()
    projections = [read(linear) for linear in (*to_fp8([q, k]), *to_fp8([gate, up]), *to_fp8([down]))]
    x = torch.randn(3, 7, 64, requires_grad=need_x)

    def plain(x, index):
        _, _, _, A, B, s = projections[index]
        return x @ dense[index].T + s * (x @ A.T) @ B.T

    ours = torch.cat([*project_in_graph(x, projections[:2]), mlp_in_graph(x, projections[2:], "silu")], -1)
    hidden = torch.nn.functional.silu(plain(x, 2)) * plain(x, 3)
    theirs = torch.cat([plain(x, 0) + bias, plain(x, 1), plain(hidden, 4)], -1)
    assert far(ours, theirs) < 0.06
    leaves = [tensor for projection in projections for tensor in projection[3:5]] + ([x] if need_x else [])
    upstream = torch.randn_like(ours)
    for mine, wanted in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
    ):
        assert far(mine, wanted) < 0.1
