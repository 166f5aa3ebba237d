from __future__ import annotations

import pytest
import torch
from torch import nn

from axolotl.kernels.frozen_weights import lay_in_a_row, lie_in_a_row
from axolotl.kernels.joined_linear import joined_linear


def make_group(
    outputs: tuple[int, ...], *, biased: bool = False, in_a_row: bool = True, dtype=torch.float64
) -> nn.ModuleList:
    torch.manual_seed(0)
    group = nn.ModuleList(nn.Linear(6, size, bias=biased and at != 1, dtype=dtype) for at, size in enumerate(outputs))
    if in_a_row:
        lay_in_a_row([linear.weight for linear in group])
    return group


def joined(group: nn.ModuleList, x: torch.Tensor) -> list[torch.Tensor]:
    return joined_linear(x, [linear.weight for linear in group], [linear.bias for linear in group])


def separate(group: nn.ModuleList, x: torch.Tensor) -> list[torch.Tensor]:
    return [linear(x) for linear in group]


def compiled(group: nn.ModuleList, x: torch.Tensor) -> list[torch.Tensor]:
    return torch.compile(joined, backend="aot_eager", fullgraph=True)(group, x)


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("in_a_row", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("outputs", [(5,), (4, 7), (8, 2, 2), (3, 1, 2, 6)])
def test_outputs_and_gradients_are_those_of_separate_layers(outputs, biased, in_a_row, need_x):
    group = make_group(outputs, biased=biased, in_a_row=in_a_row)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=need_x)
    ours, theirs = joined(group, x), separate(group, x)
    upstream = [torch.randn_like(y) for y in theirs]
    leaves = [*group.parameters(), *([x] if need_x else [])]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(ours, leaves, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(theirs, leaves, upstream), rtol=1e-12, atol=1e-12)
    assert all(grad.is_contiguous() for grad in got)


def test_outputs_that_nobody_uses_have_no_gradient():
    group, x = make_group((4, 3)), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(joined(group, x)[1].sum(), [x, group[0].weight, group[1].weight])
    wanted = torch.autograd.grad(separate(group, x)[1].sum(), [x, group[1].weight])
    torch.testing.assert_close([got[0], got[2]], list(wanted))
    assert not got[1].any()


def test_frozen_weights_get_no_gradient():
    group, x = make_group((4, 3)), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    group[0].weight.requires_grad_(False)
    sum(y.sum() for y in joined(group, x)).backward()
    assert group[0].weight.grad is None
    torch.testing.assert_close(group[1].weight.grad, x.detach().sum(0).expand(3, 6))
    group.requires_grad_(False)
    (got,) = torch.autograd.grad(sum(y.sum() for y in joined(group, x)), x)
    torch.testing.assert_close(got, sum(linear.weight.sum(0) for linear in group).expand(5, 6))


@pytest.mark.parametrize("function", [joined, compiled])
def test_training_goes_as_with_separate_layers(function):
    """Gradients of several micro-batches, clipped in place, and steps of an optimizer; then the weights move."""
    ours, theirs = make_group((8, 2, 2), biased=True), make_group((8, 2, 2), biased=True, in_a_row=False)
    optimizers = [torch.optim.AdamW(group.parameters(), lr=0.1) for group in (ours, theirs)]
    for step in range(4):
        if step == 2:
            ours[2].weight.data = ours[2].weight.data.clone()  # in a row no more
        for _ in range(2):
            x = torch.randn(2, 5, 6, dtype=torch.float64)
            for group, forward in ((ours, function), (theirs, separate)):
                sum(y.square().mean() for y in forward(group, x)).backward()
        for group, optimizer in zip((ours, theirs), optimizers, strict=True):
            nn.utils.clip_grad_norm_(group.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-9, atol=1e-9)
        assert lie_in_a_row([linear.weight for linear in ours]) is (step < 2)


def test_gradients_are_parts_of_one_memory_that_nobody_copies():
    group = make_group((8, 2, 2))
    for _ in range(2):
        sum(y.square().mean() for y in compiled(group, torch.randn(5, 6, dtype=torch.float64))).backward()
        assert lie_in_a_row([linear.weight.grad for linear in group])


@pytest.mark.parametrize("function", [joined, compiled])
def test_weights_of_another_dtype_under_autocast(function):
    group = make_group((8, 2, 2), biased=True, dtype=torch.float32)
    x = torch.randn(2, 5, 6)
    grads = []
    for forward in (function, separate):
        group.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = forward(group, x)
        assert {y.dtype for y in outputs} == {torch.bfloat16}
        sum(y.float().square().mean() for y in outputs).backward()
        grads.append([parameter.grad for parameter in group.parameters()])
    assert {grad.dtype for grad in grads[0]} == {torch.float32}
    torch.testing.assert_close(grads[0], grads[1], rtol=0.02, atol=0.01)
