"""Compiled decoder layers with fused adapters and packed rows on CUDA: the gradients of plain layers, without recompiling."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

from axolotl.kernels.frozen_weights import lie_in_a_row, round_up_rank
from axolotl.kernels.lora_glu import lora_gated_backward, lora_gated_forward
from axolotl.monkeypatch.attention import varlen
from axolotl.monkeypatch.attention.documents import add_document_hook
from axolotl.monkeypatch.compile_layers import COMPILED_BY_DEFAULT, compile_layers
from axolotl.monkeypatch.gradient_checkpointing.install import apply_activation_policies
from axolotl.monkeypatch.joined_linear import join_projections
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

KERNELS = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}


def packed(*lengths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(3, 384, (1, sum(lengths)), generator=generator).cuda()
    positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("model_type", sorted(COMPILED_BY_DEFAULT))
def test_packed_rows(model_type, kernels, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    varlen.register()
    model = make_tiny_model(tmp_path, model_type, hidden_size=128, head_dim=32, intermediate_size=256).cuda().bfloat16()
    model.config._attn_implementation = varlen.NAME
    model.config.use_cache = False
    add_document_hook(model, varlen=True)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    batches = [packed(*lengths) for lengths in ((200, 56), (90, 90, 76), (250, 6), (10, 50, 150, 46), (128, 128))]
    plain = [gradients(model, batch) for batch in batches]
    if kernels:
        apply_lora_kernel_patches(model, DictDefault(KERNELS))
    compile_layers(model)
    compiled = [gradients(model, batch) for batch in batches]
    assert not counters["graph_break"]
    # One version for the first documents and one for any others; the first layer takes no gradient of its input. And the last norm.
    assert counters["stats"]["unique_graphs"] <= 5
    for (loss, grads), (wanted, wanted_grads) in zip(compiled, plain, strict=True):
        assert loss == pytest.approx(wanted, rel=2e-2)
        assert grads.keys() == wanted_grads.keys()
        far = sum((grads[name] - grad).float().square().sum() for name, grad in wanted_grads.items())
        whole = sum(grad.float().square().sum() for grad in wanted_grads.values())
        assert (far / whole).sqrt() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model_type", sorted(COMPILED_BY_DEFAULT))
def test_joined_projections(model_type, dtype, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    varlen.register()
    model = make_tiny_model(tmp_path, model_type, hidden_size=128, head_dim=32, intermediate_size=256).cuda().to(dtype)
    model.config._attn_implementation = varlen.NAME
    model.config.use_cache = False
    add_document_hook(model.train(), varlen=True)
    batches = [packed(*lengths) for lengths in ((200, 56), (90, 90, 76), (250, 6))]
    plain = [gradients(model, batch) for batch in batches]
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    assert join_projections(model) == [None] * 2
    assert torch.cuda.memory_allocated() <= before + 2**16
    compile_layers(model)
    compiled = [gradients(model, batch) for batch in batches]
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 4
    for (loss, grads), (wanted, wanted_grads) in zip(compiled, plain, strict=True):
        assert loss == pytest.approx(wanted, rel=2e-2)
        assert grads.keys() == wanted_grads.keys()
        far = sum((grads[name] - grad).float().square().sum() for name, grad in wanted_grads.items())
        assert (far / sum(grad.float().square().sum() for grad in wanted_grads.values())).sqrt() < 0.05
    for layer in model.model.layers:
        linears = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        assert lie_in_a_row([linear.weight for linear in linears])
        assert all(linear.weight.grad.is_contiguous() and linear.weight.grad.dtype == dtype for linear in linears)
        # The gradients are written once, and nobody copies them.
        assert dtype == torch.float32 or lie_in_a_row([linear.weight.grad for linear in linears])


@pytest.mark.parametrize("offloading", [None, True, "hidden_states"])
def test_checkpointed_layers(offloading, tmp_path):
    torch._dynamo.reset()
    model = make_tiny_model(tmp_path, "llama", hidden_size=128, head_dim=32, intermediate_size=256).cuda().bfloat16()
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    model.enable_input_require_grads()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(3, 384, (2, 256), generator=torch.Generator().manual_seed(0)).cuda()
    batch = {"input_ids": ids, "labels": ids}
    wanted, wanted_grads = gradients(model, batch)
    apply_lora_kernel_patches(model, DictDefault(KERNELS))
    if offloading:
        apply_activation_policies(model, offloading=offloading)
    compile_layers(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(3):
        loss, grads = gradients(model, batch)
        assert loss == pytest.approx(wanted, rel=2e-2)
        far = sum((grads[name] - grad).float().square().sum() for name, grad in wanted_grads.items())
        assert (far / sum(grad.float().square().sum() for grad in wanted_grads.values())).sqrt() < 0.05


@pytest.mark.parametrize("write_h", [False, True])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    "ranks", [(16, 16, 16), (8, 32, 0), (0, 4, 20), (0, 4, 64), (0, 0, 0), (128, 100, 128), (160, 16, 16)]
)
@pytest.mark.parametrize("rows, size", [(2100, 200), (64, 128), (1, 24), (0, 64)])
def test_gated_activation_with_low_rank_terms(rows, size, ranks, act, write_h):
    torch.manual_seed(0)
    gate, up, down = ranks

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    gu, low, grad = half(rows, 2 * size), half(rows, gate + up), half(rows, size)
    b_gate, b_up, grad_low, a = half(size, gate) * 0.3, half(size, up) * 0.3, half(rows, down), half(down, size) * 0.3
    wide = [tensor.double().cpu() for tensor in (gu, low, b_gate, b_up, grad, grad_low, a)]
    gu64, low64, gate64, up64, grad64, grad_low64, a64 = wide
    whole = (gu64 + torch.cat([low64[:, :gate] @ gate64.T, low64[:, gate:] @ up64.T], 1)).requires_grad_()
    activations = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    wanted = activations[act](whole[:, :size]) * whole[:, size:]
    (gu_grad64,) = torch.autograd.grad(wanted, whole, grad64 + grad_low64 @ a64)
    h64 = wanted.detach()
    factors = (gu_grad64[:, :size].T @ low64[:, :gate], gu_grad64[:, size:].T @ low64[:, gate:], grad_low64.T @ h64)
    # What is left beside the low-rank inputs is not read, and gets no gradient.
    left = torch.full((rows, round_up_rank(gate + up) - gate - up), torch.nan, device="cuda").bfloat16()
    gul = torch.cat([gu, low, left], 1)
    lows = (gu_grad64[:, :size] @ gate64, gu_grad64[:, size:] @ up64, torch.zeros_like(left).double().cpu())
    gul_grad64 = torch.cat([gu_grad64, *lows], 1)
    h = lora_gated_forward(gul, b_gate, b_up, act)
    got = lora_gated_backward(grad, gul, b_gate, b_up, grad_low, a, act, write_h=write_h)
    assert not got.gul[:, 2 * size + gate + up :].any()
    pairs = [(h, h64), *zip(got, (gul_grad64, *factors), strict=True), *([(grad, h64)] if write_h else [])]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and ours.is_contiguous()
        assert (ours.double().cpu() - theirs).norm() <= 0.01 * theirs.norm()
