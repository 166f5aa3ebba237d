"""Gated activations against autograd in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from axolotl.kernels.geglu import geglu_backward, geglu_forward, geglu_tanh_backward, geglu_tanh_forward
from axolotl.kernels.glu import gated
from axolotl.kernels.swiglu import swiglu_backward, swiglu_forward

KINDS = {
    "swiglu": (swiglu_forward, swiglu_backward, F.silu),
    "geglu": (geglu_forward, geglu_backward, F.gelu),
    "geglu_tanh": (geglu_tanh_forward, geglu_tanh_backward, lambda x: F.gelu(x, approximate="tanh")),
}
SHAPES = [(2, 3, 64), (1, 1), (7,), (0, 8), (3, 5, 2, 17)]


def make(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(kind, shape):
    forward, backward, act = KINDS[kind]
    grad, gate, up = make(shape)
    gate.requires_grad_()
    up.requires_grad_()
    wanted = act(gate) * up
    wanted.backward(grad)
    torch.testing.assert_close(forward(gate.detach(), up.detach()), wanted.detach())
    h, grad_gate, grad_up = backward(grad.clone(), gate.detach().clone(), up.detach().clone())
    torch.testing.assert_close(h, wanted.detach())
    torch.testing.assert_close(grad_gate, gate.grad)
    torch.testing.assert_close(grad_up, up.grad)


@pytest.mark.parametrize(("act", "plain"), [("silu", F.silu), ("gelu", F.gelu), ("gelu_tanh", KINDS["geglu_tanh"][2])])
@pytest.mark.parametrize("joined", [False, True])
def test_with_autograd(act, plain, joined):
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(3, 5, 16, generator=generator, dtype=torch.float64)
    results = []
    for function in (lambda gate, up: gated(gate, up, act), lambda gate, up: plain(gate) * up):
        leaf = both.clone().requires_grad_()
        # Halves of one tensor are not contiguous.
        gate, up = leaf.chunk(2, dim=-1) if joined else (leaf * 2, leaf + 1)
        h = function(gate, up)
        (grad,) = torch.autograd.grad(h.square().sum(), leaf, retain_graph=True)
        (again,) = torch.autograd.grad(h.square().sum(), leaf)
        assert torch.equal(grad, again)
        results.append((h.detach(), grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_gradients_are_those_of_eager(dtype):
    grad, *inputs = (tensor.requires_grad_() for tensor in make((4, 16), dtype))
    compiled = torch.compile(lambda gate, up: gated(gate, up, "silu"), backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(
        torch.autograd.grad(compiled(*inputs), inputs, grad),
        torch.autograd.grad(gated(*inputs, "silu"), inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_rounds_once(kind, dtype):
    forward, _, act = KINDS[kind]
    _, gate, up = make((33, 9), dtype)
    wanted = (act(gate.double()) * up.double()).to(dtype)
    got = forward(gate, up)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_works_in_the_memory_of_its_inputs(kind):
    _, backward, _ = KINDS[kind]
    inputs = make((4, 6), torch.float32)
    outputs = backward(*inputs)
    assert [output.data_ptr() for output in outputs] == [given.data_ptr() for given in inputs]


def test_backward_writes_through_views():
    grad, gate, up = make((4, 10), torch.float32)
    wanted = swiglu_backward(*(tensor[:, ::2].clone() for tensor in (grad, gate, up)))
    untouched = gate[:, 1::2].clone()
    swiglu_backward(grad[:, ::2], gate[:, ::2], up[:, ::2])
    for tensor, value in zip((grad, gate, up), wanted, strict=True):
        torch.testing.assert_close(tensor[:, ::2], value)
    assert torch.equal(gate[:, 1::2], untouched)
