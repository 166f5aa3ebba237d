from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from axolotl.kernels.fp8_linear import RECIPES, Fp8TrainingLinear, linear_fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.detach().double() - theirs.detach().double()).norm() / theirs.detach().double().norm())


def rounded(x: torch.Tensor, dim: int | None, dtype: torch.dtype, *, power_of_two: bool) -> torch.Tensor:
    """x as it is after quantizing: one scale for all of it, or one for each row (dim 1) or column (dim 0)."""
    x = x.detach().double()
    largest = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = largest / torch.finfo(dtype).max
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return (x / scale).float().to(dtype).double() * scale


def reference(x, weight, grad, recipe: str):
    """y, dx and dW in double precision of factors quantized as the recipe says."""

    def each(tensor, dim, dtype=E4M3):
        return rounded(tensor, dim, dtype, power_of_two=recipe != "tensorwise")

    if recipe == "tensorwise":
        whole_grad = each(grad, None, E5M2)
        return (
            each(x, None) @ each(weight, None).T,
            whole_grad @ each(weight, None),
            whole_grad.T @ each(x, None),
        )
    y = each(x, 1) @ each(weight, 1).T
    if recipe == "rowwise":
        return y, each(grad, 1) @ each(weight, 0), each(grad, 0).T @ each(x, 0)
    return y, each(grad, 1) @ each(weight, None), grad.double().T @ x.detach().double()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rows", [32, 21, 1])
def test_matmuls_are_those_of_the_quantized_factors(recipe, rows):
    torch.manual_seed(0)
    # Rows and columns of different sizes, so that a scale of the wrong one shows.
    x = (torch.randn(rows, 64) * torch.logspace(-2, 1, 64)).requires_grad_()
    weight = (torch.randn(48, 64) * torch.logspace(-3, 0, 48)[:, None]).requires_grad_()
    grad = torch.randn(rows, 48) * torch.logspace(-6, -3, rows)[:, None]
    y = linear_fp8(x, weight, None, recipe)
    ours = (y, *torch.autograd.grad(y, (x, weight), grad))
    for mine, wanted in zip(ours, reference(x, weight, grad, recipe), strict=True):
        assert far(mine, wanted) < 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_close_to_those_of_dense_factors(recipe, dtype):
    torch.manual_seed(0)
    leaves = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((3, 16, 64), (48, 64), (48,))]
    y = linear_fp8(*leaves, recipe)
    grad = torch.randn_like(y)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = F.linear(*wide)
    assert y.dtype == dtype and far(y, wanted) < 0.05
    gradients = torch.autograd.grad(y, leaves, grad)
    # e5m2 has two bits behind the point, e4m3 three.
    limits = (0.08, 0.08, 0.01) if recipe == "tensorwise" else (0.05, 0.05, 0.01)
    for mine, wanted_grad, limit in zip(
        gradients, torch.autograd.grad(wanted, wide, grad.double()), limits, strict=True
    ):
        assert mine.dtype == dtype and far(mine, wanted_grad) < limit


def test_a_token_with_outliers_costs_the_others_nothing_with_a_scale_per_row():
    torch.manual_seed(0)
    x, weight = torch.randn(8, 64), torch.randn(32, 64)
    plain = linear_fp8(x, weight, None, "rowwise")
    x[3, 7] = 1e5
    with_outlier = linear_fp8(x, weight, None, "rowwise")
    others = [row for row in range(8) if row != 3]
    assert torch.equal(with_outlier[others], plain[others])
    assert far(linear_fp8(x, weight)[others], plain[others]) > 0.1


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(recipe, value):
    x, weight = torch.randn(16, 32), torch.randn(16, 32, requires_grad=True)
    x[5, 3] = value
    y = linear_fp8(x, weight, None, recipe)
    assert not y[5].isfinite().any()
    (grad_weight,) = torch.autograd.grad(y, weight, torch.randn(16, 16))
    assert not grad_weight[:, 3].isfinite().any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_give_zeros(recipe):
    x, weight = torch.zeros(16, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    y = linear_fp8(x, weight, None, recipe)
    grads = torch.autograd.grad(y, (x, weight), torch.zeros(16, 16))
    assert not y.any() and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("recipe", RECIPES)
def test_autocast_computes_in_its_dtype_over_weights_in_fp32(recipe):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    x = torch.randn(4, 16, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_fp8(x, linear.weight, linear.bias, recipe)
        wanted = linear(x)
    assert y.dtype == wanted.dtype == torch.bfloat16 and far(y, wanted) < 0.05
    grads = torch.autograd.grad(y, (x, linear.weight, linear.bias), torch.randn_like(y))
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_only_gradients_that_are_asked_for_are_made():
    x, weight = torch.randn(16, 32, requires_grad=True), torch.randn(16, 32)
    y = linear_fp8(x, weight)
    y.sum().backward()
    assert x.grad is not None and weight.grad is None
    y = linear_fp8(x.detach(), weight.requires_grad_())
    y.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    "recipe, need_x", [("tensorwise", True), ("tensorwise", False), ("rowwise", False), ("rowwise_with_gw_hp", True)]
)
def test_the_compiler_sees_one_graph_and_gives_the_same(recipe, need_x):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    linear.__class__ = Fp8TrainingLinear
    linear.recipe = recipe
    compiled = torch.compile(linear.forward, backend="aot_eager", fullgraph=True)
    for rows in (16, 32, 21, 37, 48):
        x = torch.randn(2, rows, 64, requires_grad=need_x)
        leaves = [*linear.parameters(), *([x] if need_x else [])]
        grad = torch.randn(2, rows, 48)
        wanted, ours = linear(x), compiled(x)
        assert far(ours, wanted) < 1e-6
        for mine, theirs in zip(
            torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
        ):
            assert far(mine, theirs) < 1e-6
    # The first shape, then all whose rows are a multiple of 16, then all others.
    assert counters["stats"]["unique_graphs"] <= 3


def test_the_largest_value_of_an_input_is_looked_for_once_for_all_layers_that_read_it():
    torch._dynamo.reset()
    searches = []

    def count(graph, inputs):
        searches.append(sum(node.target is torch.ops.aten.abs.default for node in graph.graph.nodes))
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    linears = nn.ModuleList([nn.Linear(32, 32, bias=False) for _ in range(3)])
    for linear in linears:
        linear.__class__ = Fp8TrainingLinear

    def project(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([linear(x) for linear in linears])

    x = torch.randn(16, 32, requires_grad=True)
    torch.compile(project, backend=backend, fullgraph=True)(x).sum().backward()
    # The input and three weights; backward looks at the three gradients only.
    assert searches == [1 + 3, 3]


def test_evaluation_is_dense_and_no_rows_are_no_error():
    torch.manual_seed(0)
    plain = nn.Linear(32, 16)
    linear = nn.Linear(32, 16)
    linear.load_state_dict(plain.state_dict())
    linear.__class__ = Fp8TrainingLinear
    x = torch.randn(5, 32)
    assert torch.equal(linear.eval()(x), plain(x))
    assert not torch.equal(linear.train()(x), plain(x))
    empty = linear(torch.zeros(0, 32))
    assert empty.shape == (0, 16)
    empty.sum().backward()
    assert list(linear.state_dict()) == ["weight", "bias"]
    assert "fp8 tensorwise" in repr(linear)
