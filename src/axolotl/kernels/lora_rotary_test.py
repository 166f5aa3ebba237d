"""Projections with rotated queries and keys against autograd in fp64, and the roundings of half precision."""

from __future__ import annotations

import pytest
import torch

from axolotl.kernels.frozen_weights import round_up_rank
from axolotl.kernels.lora_ops import project_in_graph, project_rotated_in_graph, rotates_in_graph
from axolotl.kernels.lora_rotary import has_kernel, lora_rotary_backward, lora_rotary_forward

SIZE, HEADS = 4, (3, 2, 2)
WIDTHS = [heads * SIZE for heads in HEADS]


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos[:, :, None] + rotate_half(x) * sin[:, :, None]


def make_projections(ranks, biases, dtype=torch.float64):
    made = []
    for width, rank, has_bias in zip(WIDTHS, ranks, biases, strict=True):
        weight, A, B = torch.randn(width, 6), torch.randn(rank, 6), torch.randn(width, rank)
        bias = torch.randn(width).to(dtype) if has_bias else None
        adapter = (A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_(), 2.0) if rank else (None, None, None)
        made.append((weight.to(dtype), bias, None, *adapter))
    return made


def make_tables(batch: int, time: int, dtype=torch.float64):
    # The halves differ: more than any model asks for.
    return torch.randn(2, batch, time, SIZE).to(dtype).unbind()


def reference(x, projections, cos, sin):
    outputs = []
    for weight, bias, _, A, B, s in projections:
        y = x @ weight.T if A is None else x @ weight.T + s * (x @ A.T) @ B.T
        outputs.append((y if bias is None else y + bias).view(*x.shape[:2], -1, SIZE))
    return rotated(outputs[0], cos, sin), rotated(outputs[1], cos, sin), outputs[2].flatten(2)


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize(("batch", "tables"), [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize(
    ("ranks", "biases"),
    [((4, 2, 3), (False, False, False)), ((4, 0, 4), (True, True, True)), ((0, 0, 1), (False, True, False))],
)
def test_values_and_gradients(ranks, biases, batch, tables, need_x):
    torch.manual_seed(0)
    projections = make_projections(ranks, biases)
    x = torch.randn(batch, 5, 6, dtype=torch.float64, requires_grad=need_x)
    cos, sin = make_tables(tables, 5)
    assert rotates_in_graph(x, ranks, SIZE, cos, sin)
    ours, theirs = project_rotated_in_graph(x, projections, cos, sin), reference(x, projections, cos, sin)
    leaves = [t for p in projections for t in p[3:5] if t is not None] + ([x] if need_x else [])
    upstream = [torch.randn_like(output) for output in ours]
    got, wanted = (
        torch.autograd.grad(sum((y * u).sum() for y, u in zip(outputs, upstream, strict=True)), leaves)
        for outputs in (ours, theirs)
    )
    for mine, right in zip((*ours, *got), (*theirs, *wanted), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


def test_outputs_that_nobody_uses_have_no_gradient():
    torch.manual_seed(0)
    projections = make_projections((2, 2, 2), (False,) * 3)
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    tables = make_tables(1, 5)
    _, key, _ = project_rotated_in_graph(x, projections, *tables)
    key.sum().backward()
    assert projections[1][3].grad.abs().sum() > 0
    assert projections[0][3].grad.abs().sum() == projections[2][4].grad.abs().sum() == 0


def test_gradients_with_other_strides():
    torch.manual_seed(0)
    cos, sin = make_tables(1, 5, torch.float32)
    grads = [torch.randn(2, 5, heads, SIZE) for heads in HEADS]
    wanted = lora_rotary_backward((grads[0], grads[1], grads[2]), cos, sin)
    query = grads[0].transpose(1, 2).contiguous().transpose(1, 2)
    key = grads[1].transpose(2, 3).contiguous().transpose(2, 3)
    value = grads[2][:, :, :1].expand(2, 5, 2, SIZE)
    whole = lora_rotary_backward((query, key, value), cos, sin, more=3)
    got = whole[:, :, : sum(WIDTHS)]
    assert whole.shape == (2, 5, sum(WIDTHS) + 3)
    torch.testing.assert_close(got[..., : -WIDTHS[2]], wanted[..., : -WIDTHS[2]], rtol=0, atol=0)
    torch.testing.assert_close(got[..., -WIDTHS[2] :], value.flatten(2), rtol=0, atol=0)


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float32])
def test_what_is_rotated_is_rounded_first(table_dtype):
    torch.manual_seed(0)
    projections = make_projections((0, 0, 0), (False,) * 3, torch.bfloat16)
    x, (cos, sin) = torch.randn(2, 5, 6).bfloat16(), make_tables(2, 5, table_dtype)
    query, key, value = project_rotated_in_graph(x, projections, cos, sin)
    apart = [y.view(2, 5, -1, SIZE) for y in project_in_graph(x, projections)]
    wanted = [rotated(y.float(), cos.float(), sin.float()).bfloat16() for y in apart[:2]]
    for got, right in zip((query, key, value), (*wanted, apart[2].flatten(2)), strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("ranks", [(4, 2, 3), (0, 0, 0)])
def test_nothing_keeps_what_the_joint_matmul_wrote(ranks, backend):
    torch.manual_seed(0)
    projections = make_projections(ranks, (False,) * 3)
    x, tables = torch.randn(1, 50, 6, dtype=torch.float64, requires_grad=True), make_tables(1, 50)
    kept = []
    torch._dynamo.reset()
    project = torch.compile(project_rotated_in_graph, backend=backend)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        outputs = project(x, projections, *tables)
    joint = 50 * (sum(WIDTHS) + round_up_rank(sum(ranks))) * 8
    assert kept and max(kept) < joint
    assert len({output.untyped_storage().data_ptr() for output in outputs}) == 3


@pytest.mark.parametrize("bias", [False, True])
def test_operators_are_registered_as_pytorch_wants_them(bias):
    torch.manual_seed(0)
    factors = torch.block_diag(*(torch.randn(width, 2) for width in WIDTHS), torch.zeros(0, 10)).requires_grad_()
    biases = [torch.randn(width) if bias else None for width in WIDTHS]
    yl = torch.randn(2, 5, sum(WIDTHS) + 16, requires_grad=True)
    arguments = (yl, factors, WIDTHS, [2, 2, 2], *biases, *make_tables(1, 5, torch.float32))
    torch.library.opcheck(torch.ops.axolotl.lora_rotary.default, arguments)


def test_what_is_left_of_the_low_rank_columns_is_not_read():
    torch.manual_seed(0)
    factors = tuple(torch.randn(width, 2) for width in WIDTHS)
    tables = make_tables(1, 5, torch.float32)
    yl = torch.randn(2, 5, sum(WIDTHS) + 16)
    wanted = lora_rotary_forward(yl, factors, (None, None, None), *tables)  # pyright: ignore[reportArgumentType]
    yl[:, :, sum(WIDTHS) + 6 :] = torch.nan
    got = lora_rotary_forward(yl, factors, (None, None, None), *tables)  # pyright: ignore[reportArgumentType]
    for mine, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=0)


def test_where_it_serves():
    x, (cos, sin) = torch.randn(2, 5, 6), make_tables(1, 5, torch.float32)
    assert rotates_in_graph(x, (2, 2, 2), SIZE, cos, sin)
    assert not rotates_in_graph(x, (2, 2, 2), 2 * SIZE, cos, sin), "a part of each head"
    assert not rotates_in_graph(x, (2, 2, 2), SIZE, cos.requires_grad_(), sin), "trained positions"
    assert not rotates_in_graph(x[0], (2, 2, 2), SIZE, cos.detach(), sin)
    assert not has_kernel(torch.float32, 128, (16,)), "matrix units"
    assert not has_kernel(torch.bfloat16, 96, (16,))
    assert not has_kernel(torch.bfloat16, 128, (256,))
