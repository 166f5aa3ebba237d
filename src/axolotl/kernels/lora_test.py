"""The LoRA functions against the same algebra in plain autograd, fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from axolotl.kernels.geglu import geglu_backward, geglu_forward, geglu_tanh_backward, geglu_tanh_forward
from axolotl.kernels.lora import (
    LoRA_Embedding,
    LoRA_MLP,
    LoRA_O,
    LoRA_QKV,
    apply_lora_mlp_geglu,
    apply_lora_mlp_swiglu,
    get_lora_parameters,
    matmul_lora,
    why_not_fused,
)
from axolotl.kernels.swiglu import swiglu_backward, swiglu_forward

ACTIVATIONS = {
    "swiglu": (swiglu_forward, swiglu_backward, F.silu),
    "geglu": (geglu_forward, geglu_backward, F.gelu),
    "geglu_tanh": (geglu_tanh_forward, geglu_tanh_backward, lambda x: F.gelu(x, approximate="tanh")),
}


def rand(*shape, grad=False, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).mul_(0.3).requires_grad_(grad)


def projection(features_out, features_in, rank=4, scale=0.5, bias=False, dtype=torch.float64):
    """The six arguments of one projection; no adapter when the rank is 0."""
    adapter = (
        (rand(rank, features_in, grad=True, dtype=dtype), rand(features_out, rank, grad=True, dtype=dtype), scale)
        if rank
        else (None, None, None)
    )
    return (
        rand(features_out, features_in, dtype=dtype),
        rand(features_out, dtype=dtype) if bias else None,
        None,
        *adapter,
    )


def plain(x, weight, bias, quant, A, B, s):
    y = F.linear(x, weight, bias)
    return y if A is None else y + s * (x @ A.t()) @ B.t()


def gradients(outputs, inputs, upstream):
    grads = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    return [torch.zeros_like(i) if grad is None else grad for grad, i in zip(grads, inputs, strict=True)]


def trained(x, *projections):
    own = [tensor for proj in projections for tensor in (proj[3], proj[4]) if tensor is not None]
    return [*([x] if x.requires_grad else []), *own]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 2, 0), (0, 3, 0), (1, 8, 5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("x_grad", [True, False])
def test_qkv(ranks, bias, x_grad):
    x = rand(2, 5, 12, grad=x_grad)
    q, k, v = (
        projection(out, 12, rank, scale, bias)
        for out, rank, scale in zip((16, 8, 8), ranks, (0.5, 2.0, 0.1), strict=True)
    )
    got = LoRA_QKV.apply(x, *q, *k, *v)
    wanted = [plain(x, *proj) for proj in (q, k, v)]
    torch.testing.assert_close(list(got), wanted)
    inputs, upstream = trained(x, q, k, v), [torch.randn_like(y) for y in wanted]
    # Without a gradient of x, a projection without an adapter is a constant to autograd.
    reached = [at for at, y in enumerate(wanted) if y.requires_grad]
    got, wanted, upstream = ([values[at] for at in reached] for values in (got, wanted, upstream))
    torch.testing.assert_close(gradients(got, inputs, upstream), gradients(wanted, inputs, upstream))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 7), (1, 7), (2, 3, 7), (0, 7)])
def test_o(shape, bias):
    x, proj = rand(*shape, grad=True), projection(11, 7, bias=bias)
    got, wanted = LoRA_O.apply(x, *proj), plain(x, *proj)
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn_like(wanted)
    torch.testing.assert_close(
        gradients(got, trained(x, proj), upstream), gradients(wanted, trained(x, proj), upstream)
    )


def test_gradient_of_a_sum_is_not_laid_out_in_memory():
    x, proj = rand(3, 5, 7, grad=True), projection(11, 7)
    LoRA_O.apply(x, *proj).sum().backward()
    got, x.grad = x.grad, None
    plain(x, *proj).sum().backward()
    torch.testing.assert_close(got, x.grad)


def mlp_arguments(ranks, bias):
    gate, up = projection(20, 12, ranks[0], 0.5, bias), projection(20, 12, ranks[1], 2.0, bias)
    return gate, up, projection(12, 20, ranks[2], 0.7, bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 0, 2), (0, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_mlp(activation, ranks, bias, inplace):
    forward, backward, act = ACTIVATIONS[activation]
    gate, up, down = mlp_arguments(ranks, bias)
    x = rand(2, 5, 12, grad=True)
    got = LoRA_MLP.apply(x, *gate, *up, *down, forward, backward, inplace)
    wanted = plain(act(plain(x, *gate)) * plain(x, *up), *down)
    torch.testing.assert_close(got, wanted)
    inputs, upstream = trained(x, gate, up, down), torch.randn_like(wanted)
    kept = upstream.clone()
    torch.testing.assert_close(gradients(got, inputs, upstream), gradients(wanted, inputs, upstream))
    assert torch.equal(upstream, kept), "the gradient that comes in belongs to others too"


def test_second_backward_is_right_or_refused():
    gate, up, down = mlp_arguments((4, 4, 4), False)
    x = rand(2, 12, grad=True)
    for inplace in (False, True):
        y = LoRA_MLP.apply(x, *gate, *up, *down, swiglu_forward, swiglu_backward, inplace).sum()
        first = torch.autograd.grad(y, x, retain_graph=True)
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y, x)
        else:
            torch.testing.assert_close(torch.autograd.grad(y, x), first)


def test_mlp_does_not_keep_the_product():
    gate, up, down = mlp_arguments((4, 4, 4), False)
    x = rand(3, 12, grad=True)
    y = LoRA_MLP.apply(x, *gate, *up, *down, swiglu_forward, swiglu_backward, True)
    wide = [tensor for tensor in y.grad_fn.saved_tensors if tensor is not None and tensor.shape == (3, 20)]
    assert len(wide) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_fp32_adapters_down_and_gives_fp32_gradients(dtype):
    x, proj = rand(6, 16, grad=True, dtype=torch.float32), projection(24, 16, dtype=torch.float32)
    proj = (proj[0].to(dtype), *proj[1:])
    with torch.autocast("cpu", dtype):
        got, wanted = LoRA_O.apply(x, *proj), plain(x, *proj)
    assert got.dtype == dtype
    upstream = torch.randn_like(got)
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, wanted.to(dtype), rtol=eps, atol=eps)
    for g, w in zip(
        gradients(got, trained(x, proj), upstream), gradients(wanted.to(dtype), trained(x, proj), upstream), strict=True
    ):
        assert g.dtype == torch.float32
        assert (g - w).norm() < eps * w.norm() * 2


def test_four_bit_weights():
    bnb = pytest.importorskip("bitsandbytes.functional")
    x, proj = rand(6, 64, grad=True, dtype=torch.float32), projection(32, 64, dtype=torch.float32)
    packed, state = bnb.quantize_4bit(proj[0], quant_type="nf4", compress_statistics=True)
    dense = bnb.dequantize_4bit(packed, state)
    got, wanted = LoRA_O.apply(x, packed, None, state, *proj[3:]), plain(x, dense, None, None, *proj[3:])
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn_like(wanted)
    torch.testing.assert_close(
        gradients(got, trained(x, proj), upstream), gradients(wanted, trained(x, proj), upstream)
    )
    torch.testing.assert_close(matmul_lora(x, packed, None, state, *proj[3:]), wanted)


def test_matmul_lora():
    x, proj = rand(2, 3, 7, grad=True), projection(11, 7, bias=True)
    got, wanted = matmul_lora(x, *proj), plain(x, *proj)
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn_like(wanted)
    torch.testing.assert_close(
        gradients(got, trained(x, proj), upstream), gradients(wanted, trained(x, proj), upstream)
    )
    out = torch.empty(6, 11, dtype=x.dtype)
    with torch.no_grad():
        matmul_lora(x, *proj, out=out)
    torch.testing.assert_close(out.view(2, 3, 11), wanted)
    torch.testing.assert_close(matmul_lora(x, proj[0], None, None, None, None, None), x @ proj[0].t())


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding(padding_idx):
    ids = torch.tensor([[1, 2, 2], [0, 1, 4]])
    weight, A, B = rand(6, 5), rand(3, 6, grad=True), rand(5, 3, grad=True)
    got = LoRA_Embedding.apply(ids, weight, A, B, 0.5, padding_idx)
    wanted = F.embedding(ids, weight) + 0.5 * F.embedding(ids, A.t(), padding_idx=padding_idx) @ B.t()
    torch.testing.assert_close(got, wanted)
    upstream = torch.randn_like(wanted)
    torch.testing.assert_close(gradients(got, [A, B], upstream), gradients(wanted, [A, B], upstream))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)


def adapted(**config):
    mlp = MLP().requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"], **config), mlp
    )
    for name, parameter in mlp.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return mlp.train()


def test_parameters_of_a_projection():
    proj = adapted().gate_proj
    W, b, quant, A, B, s = get_lora_parameters(proj)
    assert (W.shape, b.shape, quant, A.shape, B.shape, s) == ((12, 8), (12,), None, (2, 8), (12, 2), 4.0)
    proj.enable_adapters(False)
    assert get_lora_parameters(proj)[3:] == (None, None, None)
    proj.enable_adapters(True)
    proj.merge()
    assert get_lora_parameters(proj)[3:] == (None, None, None)
    assert get_lora_parameters(nn.Linear(3, 4))[3:] == (None, None, None)


def is_fused(mlp, x):
    node = apply_lora_mlp_swiglu(mlp, x).grad_fn
    # PyTorch 2.11 does not tell what comes before a function of ours.
    return "LoRA_MLP" in type(node).__name__ or "LoRA_MLP" in type(node.next_functions[0][0]).__name__


@pytest.mark.parametrize(
    "config, reason",
    [
        ({}, None),
        ({"lora_dropout": 0.3}, "dropout"),
        ({"use_dora": True}, "Dora"),
        ({"lora_bias": True}, "bias"),
        ({"bias": "lora_only"}, "trained"),
    ],
)
def test_what_the_functions_do_not_compute_runs_as_modules(config, reason):
    mlp, x = adapted(**config), torch.randn(3, 8, requires_grad=True)
    if config.get("bias"):
        mlp.gate_proj.base_layer.bias.requires_grad_(True)
    why = why_not_fused(mlp.gate_proj)
    assert (why is None) if reason is None else reason in why
    assert is_fused(mlp, x) == (reason is None)
    torch.manual_seed(3)
    got = apply_lora_mlp_swiglu(mlp, x)
    torch.manual_seed(3)
    wanted = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(got, wanted)
    mlp.eval()
    if "lora_dropout" in config:
        assert is_fused(mlp, x)


def test_hooks_and_second_adapters_run_as_modules():
    mlp, x = adapted(), torch.randn(3, 8, requires_grad=True)
    seen = []
    handle = mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    assert not is_fused(mlp, x) and seen
    handle.remove()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["gate_proj"]), mlp, adapter_name="other")
    mlp.gate_proj.set_adapter(["default", "other"])
    assert why_not_fused(mlp.gate_proj) == "several adapters are active"


@pytest.mark.parametrize("kind", ["none", "tanh"])
def test_geglu_takes_the_gelu_that_the_mlp_names(kind):
    mlp, x = adapted(), torch.randn(3, 8)
    mlp.gelu_approximate = kind
    wanted = mlp.down_proj(F.gelu(mlp.gate_proj(x), approximate=kind) * mlp.up_proj(x))
    torch.testing.assert_close(apply_lora_mlp_geglu(mlp, x), wanted)
