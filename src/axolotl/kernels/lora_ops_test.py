from __future__ import annotations

import pytest
import torch

from axolotl.kernels.frozen_weights import lay_in_a_row
from axolotl.kernels.lora_glu import lora_gated_backward, lora_gated_forward
from axolotl.kernels.lora_ops import mlp_in_graph, project_in_graph

NO_STATE = [0] * 5  # the layout of one dense weight

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def make_projection(inputs: int, outputs: int, rank: int, *, bias: bool = False, scale: float = 2.0):
    weight = torch.randn(outputs, inputs, dtype=torch.float64)
    A = torch.randn(rank, inputs, dtype=torch.float64, requires_grad=True) if rank else None
    B = torch.randn(outputs, rank, dtype=torch.float64, requires_grad=True) if rank else None
    return weight, torch.randn(outputs, dtype=torch.float64) if bias else None, None, A, B, scale if rank else None


def reference(x: torch.Tensor, projection) -> torch.Tensor:
    weight, bias, _, A, B, scale = projection
    y = x @ weight.T
    if A is not None:
        y = y + scale * (x @ A.T) @ B.T
    return y if bias is None else y + bias


def trained(projections) -> list[torch.Tensor]:
    return [tensor for _, _, _, A, B, _ in projections for tensor in (A, B) if tensor is not None]


def assert_same_gradients(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(ours)
    got = torch.autograd.grad(ours, leaves, upstream)
    for mine, wanted in zip(got, torch.autograd.grad(theirs, leaves, upstream), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("ranks", [(4, 2, 3), (4, 0, 4), (1,), (0, 5)])
def test_projections_of_one_input(ranks, need_x):
    torch.manual_seed(0)
    projections = [make_projection(6, 5 + index, rank, bias=index == 1) for index, rank in enumerate(ranks)]
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=need_x)
    leaves = [*trained(projections), *([x] if need_x else [])]
    outputs = project_in_graph(x, projections)
    wanted = [reference(x, projection) for projection in projections]
    assert_same_gradients(torch.cat(outputs, -1), torch.cat(wanted, -1), leaves)


def test_outputs_that_nobody_uses_have_no_gradient():
    torch.manual_seed(0)
    projections = [make_projection(6, 5, 2), make_projection(6, 5, 2)]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert_same_gradients(
        project_in_graph(x, projections)[0], reference(x, projections[0]), [x, *trained(projections[:1])]
    )


@pytest.mark.parametrize("room", [None, 0, 16])
@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize("ranks", [(4, 2, 3), (0, 3, 0), (2, 2, 0), (0, 0, 4)])
def test_mlp(ranks, act, room):
    torch.manual_seed(0)
    gate, up, down = make_projection(6, 8, ranks[0]), make_projection(6, 8, ranks[1]), make_projection(8, 5, ranks[2])
    if room is not None:
        weights = [torch.nn.Parameter(projection[0], requires_grad=False) for projection in (gate, up, down)]
        lay_in_a_row(weights[:2], room)
        lay_in_a_row(weights[2:], room)
        assert weights[1].data_ptr() == weights[0].data_ptr() + weights[0].nbytes
        gate, up, down = (
            (weight, *projection[1:]) for weight, projection in zip(weights, (gate, up, down), strict=True)
        )
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    ours = mlp_in_graph(x, [gate, up, down], act, room or 0, room or 0)
    theirs = reference(ACTIVATIONS[act](reference(x, gate)) * reference(x, up), down)
    # The activation computes in fp64 only where its inputs are: no rounding beyond that of the sums.
    assert_same_gradients(ours, theirs, [x, *trained([gate, up, down])])


def test_laying_weights_in_a_row_keeps_them():
    weights = [torch.nn.Parameter(torch.randn(rows, 3)) for rows in (4, 2, 5)]
    wanted = [weight.detach().clone() for weight in weights]
    lay_in_a_row(weights)
    for weight, was in zip(weights, wanted, strict=True):
        torch.testing.assert_close(weight.data, was, rtol=0, atol=0)


def test_projections_whose_weights_lie_in_a_row():
    torch.manual_seed(0)
    projections = [make_projection(6, 4 + index, 2) for index in range(3)]
    weights = [torch.nn.Parameter(projection[0], requires_grad=False) for projection in projections]
    lay_in_a_row(weights)
    projections = [(weight, *projection[1:]) for weight, projection in zip(weights, projections, strict=True)]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    outputs = project_in_graph(x, projections)
    wanted = [reference(x, projection) for projection in projections]
    assert_same_gradients(torch.cat(outputs, -1), torch.cat(wanted, -1), [x, *trained(projections)])


def test_gated_backward_leaves_the_activation_where_it_is_asked_to():
    torch.manual_seed(0)
    gul, grad = torch.randn(5, 14 + 4), torch.randn(5, 7)
    b_gate, b_up, grad_low, a = torch.randn(7, 2), torch.randn(7, 1), torch.randn(5, 4), torch.randn(4, 7)
    h = lora_gated_forward(gul, b_gate, b_up, "silu")
    lora_gated_backward(grad, gul, b_gate, b_up, grad_low, a, "silu", write_h=True)
    torch.testing.assert_close(grad, h)


def wide(*shape: int, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


@pytest.mark.parametrize("need_x", [True, False])
def test_gradients_of_projections_whose_x_is_scaled_by_rows(need_x):
    torch.manual_seed(0)
    x, weight, a, b, low = wide(7, 6), wide(5, 6), wide(3, 6), wide(5, 3), wide(7, 3)
    scale = torch.rand(7, 1) + 0.5
    frozen = ([weight], [], NO_STATE)
    for operator, arguments in (
        (torch.ops.axolotl.lora_project_backward, (wide(7, 5), x, *frozen, a, b, low, need_x)),
        (torch.ops.axolotl.lora_project_apart_backward, (wide(7, 5 + 3), x, *frozen, a, 0, need_x)),
    ):
        got = operator(*arguments, scale)
        wanted = list(operator(*arguments))
        wanted[1] = operator(arguments[0], x * scale, *arguments[2:])[1]
        for mine, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
        torch.library.opcheck(operator.default, (*arguments, scale))


def test_gradients_of_scaled_rows_are_rounded_once():
    torch.manual_seed(0)
    grad, x, weight = torch.randn(64, 5 + 16).bfloat16(), torch.randn(64, 32).bfloat16(), torch.randn(5, 32).bfloat16()
    scale, a = torch.rand(64, 1) * 3, torch.randn(16, 32).bfloat16()
    _, got = torch.ops.axolotl.lora_project_apart_backward(grad, x, [weight], [], NO_STATE, a, 0, False, scale)
    wanted = (grad[:, 5:].float() * scale).bfloat16().t() @ x
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("keep_low", [True, False])
@pytest.mark.parametrize("rank", [0, 3])
def test_down_with_a_residual(rank, keep_low):
    torch.manual_seed(0)
    gul, residual = wide(5, 16 + 4, requires_grad=True), wide(5, 6, requires_grad=True)
    factors = [wide(8, 2, requires_grad=True), wide(8, 1, requires_grad=True)]
    a, b = wide(rank, 8, requires_grad=True), wide(6, rank, requires_grad=True)
    arguments = (gul, *factors, [wide(6, 8)], [], NO_STATE, a, b, 0, "silu", keep_low)
    ours, low = torch.ops.axolotl.lora_down(*arguments, residual)
    plain, wanted_low = torch.ops.axolotl.lora_down(*arguments)
    assert ours.is_contiguous()
    torch.testing.assert_close(low, wanted_low, rtol=0, atol=0)
    assert_same_gradients(ours, plain + residual, [gul, *factors, *([a, b] if rank else []), residual])
    torch.library.opcheck(torch.ops.axolotl.lora_down.default, (*arguments, residual))
    torch.library.opcheck(torch.ops.axolotl.lora_down.default, arguments)
