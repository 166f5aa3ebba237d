"""Attention on a CUDA device: the varlen kernel and flex attention against fp32 attention of each document alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from axolotl.monkeypatch.attention import flash4, varlen
from axolotl.monkeypatch.attention.documents import add_document_hook, register_masks
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = (21, 3, 17, 1, 9, 13)
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def _summed_loss(model, ids, labels, **kwargs):
    logits = model(input_ids=ids, **kwargs).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def _load(folder: Path, implementation: str, dtype: torch.dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, dtype=dtype).cuda().train()
    add_document_hook(model, varlen=implementation == varlen.NAME)
    return model


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("implementation", [varlen.NAME, "flex_attention", "sdpa"])
def test_packed_equals_each_document_alone(tmp_path: Path, architecture: str, implementation: str) -> None:
    if architecture == "gemma2" and implementation == "sdpa":
        pytest.skip("transformers has no sdpa for gemma2")
    varlen.register()
    register_masks()
    make_tiny_model(tmp_path, architecture, **WIDE)
    torch.manual_seed(0)
    documents = [torch.randint(3, 384, (n,), device="cuda") for n in LENGTHS]
    exact = _load(tmp_path, "eager", torch.float32)
    loss_exact = sum(_summed_loss(exact, x[None], x[None]) for x in documents if len(x) > 1)
    loss_exact.backward()

    model = _load(tmp_path, implementation, torch.bfloat16)
    ids = torch.cat(documents)[None]
    labels = torch.cat([torch.cat([torch.tensor([-100], device="cuda"), x[1:]]) for x in documents])[None]
    positions = torch.cat([torch.arange(n, device="cuda") for n in LENGTHS])[None]
    loss = _summed_loss(model, ids, labels, position_ids=positions)
    loss.backward()

    assert loss.item() == pytest.approx(loss_exact.item(), rel=2e-2)
    for (name, grad), (_, grad_exact) in zip(_grads(model), _grads(exact), strict=True):
        cosine = torch.nn.functional.cosine_similarity(grad.float().flatten(), grad_exact.flatten(), dim=0)
        assert cosine > 0.98, (name, cosine.item())


def _grads(model):
    return [(name, parameter.grad) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("kernel", ["torch", "flash4"])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_equals_the_path_without_it(
    kernel: str, head_size: int, window: int | None, packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of 8 query heads on 2 key heads, windows below and above the document lengths."""
    torch.manual_seed(0)
    lengths = [700, 1, 0, 123, 200, 1024]
    rows, total = (1, sum(lengths)) if packed else (2, 515)
    borders = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    told = {"cu_seq_lens_q": borders, "max_length_q": max(lengths)} if packed else {}
    layer = torch.nn.Identity()
    inputs = [
        torch.randn(rows, heads, total, head_size, device="cuda", dtype=dtype, requires_grad=True)
        for heads in (8, 2, 2)
    ]
    if kernel == "torch":
        monkeypatch.setattr(flash4, "serves", lambda *tensors: False)
    elif not flash4.is_installed():
        pytest.skip("needs the package flash-attn-4")

    def run():
        out, _ = varlen.varlen_attention_forward(
            layer, *inputs, None, scaling=0.1, sliding_window=window, is_causal=True, **told
        )
        grads = torch.autograd.grad(out.float().square().sum(), inputs)
        return [out, *grads]

    assert varlen.kernel_refusal(inputs[0], inputs[2], None, None, 0.0) is None
    assert flash4.serves(*inputs) == (kernel == "flash4")
    with_kernel = run()
    monkeypatch.setattr(varlen, "kernel_refusal", lambda *args: "compare")
    for ours, plain in zip(with_kernel, run(), strict=True):
        apart, size = (ours - plain).float(), plain.float()
        assert apart.norm() < 5e-3 * size.norm()
        assert apart.abs().max() < 0.02 * size.abs().max()


def test_autocast_reaches_the_kernel(tmp_path: Path) -> None:
    """fp32 weights under bf16 autocast: rotary embeddings make fp32 queries, which the kernel would refuse."""
    varlen.register()
    register_masks()
    make_tiny_model(tmp_path, "llama", **WIDE)
    model = _load(tmp_path, varlen.NAME, torch.float32)
    ids = torch.randint(3, 384, (1, 64), device="cuda")
    positions = torch.cat([torch.arange(40), torch.arange(24)])[None].cuda()
    with torch.autocast("cuda", torch.bfloat16), torch.profiler.profile() as profile:
        model(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
    assert any("varlen" in event.key or "flash" in event.key for event in profile.key_averages())
