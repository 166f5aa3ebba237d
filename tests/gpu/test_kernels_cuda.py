"""The LoRA kernels on CUDA: Triton against fp64, 4-bit weights against bitsandbytes, whole models against plain peft.

pytest tests/gpu/test_kernels_cuda.py
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from axolotl.kernels import lora_rotary
from axolotl.kernels.geglu import geglu_backward, geglu_forward, geglu_tanh_backward, geglu_tanh_forward
from axolotl.kernels.lora import LoRA_MLP, LoRA_O, LoRA_QKV
from axolotl.kernels.lora_rotary import lora_rotary_backward, lora_rotary_forward
from axolotl.kernels.quantize import dequantize
from axolotl.kernels.swiglu import swiglu_backward, swiglu_forward
from axolotl.monkeypatch.compile_layers import compile_layers
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
from axolotl.utils.dict import DictDefault

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

KINDS = {
    "swiglu": (swiglu_forward, swiglu_backward, F.silu),
    "geglu": (geglu_forward, geglu_backward, F.gelu),
    "geglu_tanh": (geglu_tanh_forward, geglu_tanh_backward, lambda x: F.gelu(x, approximate="tanh")),
}
ALL = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True, "lora_embedding_kernel": True}
HALF = [torch.bfloat16, torch.float16]


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.double().cpu(), wanted.double().cpu()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-12))


# --- gated activations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(2, 3, 64), (1,), (1023,), (1025,), (7, 333), (0, 4), (64, 14336)])
def test_gated_activations(kind, dtype, shape):
    forward, backward, act = KINDS[kind]
    torch.manual_seed(0)
    grad, gate, up = ((3 * torch.randn(shape, device="cuda")).to(dtype) for _ in range(3))
    gate64, up64 = gate.double().requires_grad_(), up.double().requires_grad_()
    wanted = act(gate64) * up64
    wanted.backward(grad.double())
    got = forward(gate, up)
    inputs = (grad.clone(), gate.clone(), up.clone())
    outputs = backward(*inputs)
    assert [o.data_ptr() for o in outputs] == [i.data_ptr() for i in inputs]
    eps = max(1e-5, torch.finfo(dtype).eps)
    pairs = ((got, wanted), *zip(outputs, (wanted, gate64.grad, up64.grad), strict=True))
    for value, reference in pairs:
        assert value.dtype == dtype and value.shape == reference.shape
        assert error(value, reference) < eps
        torch.testing.assert_close(value.double(), reference.detach(), rtol=4 * eps, atol=4 * eps)


def test_more_elements_than_32_bits_count():
    n = 2**31 + 1031
    gate, up = torch.zeros(n, device="cuda", dtype=torch.bfloat16), torch.zeros(n, device="cuda", dtype=torch.bfloat16)
    gate[-1031:], up[-1031:] = 2.0, 3.0
    h = swiglu_forward(gate, up)
    wanted = float(F.silu(torch.tensor(2.0)) * 3)
    assert h[-1031:].float().sub(wanted).abs().max() < 0.02 * wanted
    assert h[:1024].abs().max() == 0 and h[2**31 - 8 : 2**31].abs().max() == 0
    h, grad_gate, grad_up = swiglu_backward(torch.ones_like(gate), gate, up)
    assert abs(h[-1].item() - wanted) < 0.02 * wanted and abs(grad_up[-1].item() - wanted / 3) < 0.02
    assert grad_gate[0].item() == 0


# --- 4 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(1024, 4096), (33, 65), (1, 7), (4096, 64)])
def test_dequantize_equals_bitsandbytes(kind, nested, blocksize, dtype, shape):
    bnb = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(shape, device="cuda", dtype=dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind)
    wanted = bnb.dequantize_4bit(packed, state)
    got = dequantize(packed, state)
    assert got.shape == wanted.shape and got.dtype == dtype
    # The nested scale is one fused multiply-add here and two roundings there: a last bit of fp32.
    torch.testing.assert_close(got, wanted, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-6)
    if dtype in HALF and got.numel() > 1000:
        assert (got != wanted).float().mean() < 1e-2
    out = torch.empty_like(wanted)
    assert dequantize(packed, state, out=out) is out and torch.equal(out, got)
    assert torch.equal(dequantize(packed.t(), state), got.t()) or packed.numel() == 1
    if nested:
        inner = state.state2
        old = [state.absmax, state.shape, state.dtype, state.blocksize,
               [state.offset, [inner.absmax, inner.code, inner.blocksize, None, None, None, None]], kind, None]  # fmt: skip
        if kind == "nf4":
            assert torch.equal(dequantize(packed, old), got)


def test_dequantize_speed(capsys):
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(14336, 4096, device="cuda", dtype=torch.bfloat16)
    packed, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")

    def milliseconds(function):
        for _ in range(5):
            function()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(50):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 50

    ours, theirs = (
        milliseconds(lambda: dequantize(packed, state)),
        milliseconds(lambda: bnb.dequantize_4bit(packed, state)),
    )
    gigabytes = (weight.numel() * 2 + packed.numel()) / 1e9
    with capsys.disabled():
        print(f"\nNF4 14336x4096 to bf16: {ours:.3f} ms ({gigabytes / ours:.2f} TB/s), bitsandbytes {theirs:.3f} ms")
    assert ours < 1.5 * theirs


# --- functions --------------------------------------------------------------------------------------------------------


def projection(features_out, features_in, rank, quantized=False):
    """Arguments of one projection in bf16 over an fp32 adapter, and their fp64 twins with the same values."""
    weight = torch.randn(features_out, features_in, device="cuda", dtype=torch.bfloat16) * features_in**-0.5
    A = (torch.randn(rank, features_in, device="cuda") * features_in**-0.5).requires_grad_()
    B = (torch.randn(features_out, rank, device="cuda") * 0.3).requires_grad_()
    quant, dense = None, weight
    if quantized:
        bnb = pytest.importorskip("bitsandbytes.functional")
        weight, quant = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        dense = bnb.dequantize_4bit(weight, quant)
    twin = (dense.double(), A.detach().double().requires_grad_(), B.detach().double().requires_grad_(), 0.5)
    return (weight, None, quant, A, B, 0.5), twin


def plain(x, twin):
    weight, A, B, s = twin
    return x @ weight.t() + s * (x @ A.t()) @ B.t()


def check(got, wanted, inputs, inputs64, tolerance=2e-2):
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == torch.bfloat16 and error(g, w) < tolerance
    upstream = [torch.randn_like(g) for g in got]
    grads = torch.autograd.grad(got, inputs, upstream)
    grads64 = torch.autograd.grad(wanted, inputs64, [u.double() for u in upstream])
    for given, g, w in zip(inputs, grads, grads64, strict=True):
        assert g.dtype == given.dtype and error(g, w) < tolerance


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("rank", [1, 8, 17])
@pytest.mark.parametrize("tokens", [(2, 128), (1, 37)])
@torch.autocast("cuda", torch.bfloat16)
def test_qkv_and_o(quantized, rank, tokens):
    torch.manual_seed(0)
    x = torch.randn(*tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    parts = [projection(out, 256, rank, quantized) for out in (256, 64, 64)]
    arguments = [value for own, _ in parts for value in own]
    inputs = [x, *(t for own, _ in parts for t in own[3:5])]
    inputs64 = [x64, *(t for _, twin in parts for t in twin[1:3])]
    check(LoRA_QKV.apply(x, *arguments), [plain(x64, twin) for _, twin in parts], inputs, inputs64)
    own, twin = parts[0]
    check([LoRA_O.apply(x, *own)], [plain(x64, twin)], [x, *own[3:5]], [x64, *twin[1:3]])


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace", [False, True])
@torch.autocast("cuda", torch.bfloat16)
def test_mlp(quantized, kind, inplace):
    torch.manual_seed(0)
    forward, backward, act = KINDS[kind]
    x = torch.randn(3, 77, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    parts = [projection(704, 256, 8, quantized), projection(704, 256, 8, quantized), projection(256, 704, 8, quantized)]
    arguments = [value for own, _ in parts for value in own]
    got = LoRA_MLP.apply(x, *arguments, forward, backward, inplace)
    gate, up, down = (twin for _, twin in parts)
    wanted = plain(act(plain(x64, gate)) * plain(x64, up), down)
    inputs = [x, *(t for own, _ in parts for t in own[3:5])]
    inputs64 = [x64, *(t for _, twin in parts for t in twin[1:3])]
    check([got], [wanted], inputs, inputs64)


def test_a_second_backward_in_place_is_refused():
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    arguments = [v for shape in ((128, 64), (128, 64), (64, 128)) for v in projection(*shape, 4)[0]]
    y = LoRA_MLP.apply(x, *arguments, swiglu_forward, swiglu_backward, True).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# --- rotated queries and keys -----------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The kernels of `lora_rotary` that were launched."""
    done = []

    def spy(name):
        launch = getattr(lora_rotary, name)
        monkeypatch.setattr(lora_rotary, name, lambda *args: done.append(name) or launch(*args))

    spy("_launch_forward")
    spy("_launch_backward")
    return done


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("table_dtype", ["same", torch.float32])
@pytest.mark.parametrize(("batch", "tables", "time"), [(1, 1, 1), (1, 1, 333), (3, 1, 77), (2, 2, 64)])
@pytest.mark.parametrize(
    ("size", "heads", "ranks", "bias"),
    [
        (128, (9, 2, 2), (16, 16, 16), False),
        (64, (4, 4, 4), (8, 0, 3), True),
        (128, (8, 1, 1), (0, 0, 0), True),
        (128, (17, 8, 8), (64, 17, 128), False),
        (256, (3, 1, 1), (16, 64, 1), True),
    ],
)
def test_rotated_queries_and_keys(size, heads, ranks, bias, batch, tables, time, table_dtype, dtype, launches):
    torch.manual_seed(0)
    widths = [count * size for count in heads]
    more = -(-sum(ranks) // 16) * 16
    yl = torch.randn(batch, time, sum(widths) + more, device="cuda").to(dtype)
    yl[:, :, sum(widths) + sum(ranks) :] = torch.nan
    b = (torch.randn(sum(widths), more + 16, device="cuda") * 0.3).to(dtype)
    factors = [
        rows.narrow(1, sum(ranks[:at]), rank)
        for at, (rows, rank) in enumerate(zip(b.split(widths), ranks, strict=True))
    ]
    biases = [torch.randn(width, device="cuda").to(dtype) if bias and width != widths[1] else None for width in widths]
    cos, sin = (
        torch.randn(2, tables, time, size, device="cuda").to(dtype if table_dtype == "same" else table_dtype).unbind()
    )
    grads = [torch.randn(batch, count, time, size, device="cuda").to(dtype).transpose(1, 2) for count in heads]
    grads[1] = grads[1].contiguous()

    def double(tensors):
        return [None if tensor is None else tensor.double() for tensor in tensors]

    got = lora_rotary_forward(yl, factors, biases, cos, sin)
    back = lora_rotary_backward(grads, cos, sin, more)
    assert launches == ["_launch_forward", "_launch_backward"]
    wanted = lora_rotary_forward(yl.double(), double(factors), double(biases), cos.double(), sin.double())
    wanted_back = lora_rotary_backward(double(grads), cos.double(), sin.double())
    assert len(launches) == 2
    assert back.shape == yl.shape and back.is_contiguous()
    for value, reference in zip((*got, back[..., : sum(widths)]), (*wanted, wanted_back), strict=True):
        assert value.dtype == dtype and value.shape == reference.shape
        # Queries and keys are rounded before they are rotated, and after.
        assert error(value, reference) < torch.finfo(dtype).eps
        torch.testing.assert_close(
            value.double(), reference, rtol=8 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps
        )


def test_rotated_rows_beyond_32_bits():
    rows, size = 2**31 // 640 + 70, 64
    yl = torch.zeros(1, rows, 10 * size, device="cuda", dtype=torch.bfloat16)
    yl[:, -70:] = 2.0
    factors = [yl.new_zeros(count * size, 0) for count in (8, 1, 1)]
    cos, sin = torch.ones(2, 1, rows, size, device="cuda", dtype=torch.bfloat16).unbind()
    query, key, value = lora_rotary_forward(yl, factors, (None, None, None), cos, sin)
    for x, (first, second) in ((query, (0.0, 4.0)), (key, (0.0, 4.0)), (value, (2.0, 2.0))):
        assert (x[:, -70:, :, :32] == first).all() and (x[:, -70:, :, 32:] == second).all()
        assert not x[:, :-70].any()
    grad = lora_rotary_backward((query, key, value), cos, sin)
    assert (grad[:, -70:, : 9 * size] == 4.0).all() and (grad[:, -70:, 9 * size :] == 2.0).all()
    assert not grad[:, :-70].any()


# --- whole models -----------------------------------------------------------------------------------------------------

MODELS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": 64}),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "query_pre_attn_scalar": 32}),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 32}),
}
SHAPE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "use_cache": False,
}  # fmt: skip


def build(kind: str, *, four_bit: bool = False, checkpointing: bool = False):
    torch.manual_seed(0)
    name, own = MODELS[kind]
    config = getattr(transformers, name)(**SHAPE, **own)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if four_bit:
        bnb = pytest.importorskip("bitsandbytes")
        for path, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear) and path != "lm_head":
                new = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=linear.bias is not None,
                    compute_dtype=torch.bfloat16, quant_type="nf4",
                )  # fmt: skip
                new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to("cuda")
                new.bias = linear.bias
                model.set_submodule(path, new)
        model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).to("cuda").train()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.05)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def step(model):
    model.zero_grad()
    ids = torch.randint(0, 512, (2, 200), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_models(reference, other):
    (loss, grads), (other_loss, other_grads) = reference, other
    assert other_loss == pytest.approx(loss, rel=2e-3)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        assert error(other_grads[name], grad) < 0.1, name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("four_bit", [False, True])
def test_models(kind, four_bit):
    model, cfg = build(kind, four_bit=four_bit), DictDefault(ALL)
    reference = step(model)
    apply_lora_kernel_patches(model, cfg)
    assert cfg.resolution is None, cfg.resolution
    check_models(reference, step(model))


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_compiled_layers_rotate_in_the_kernel(kind, four_bit, launches, monkeypatch):
    monkeypatch.setitem(SHAPE, "num_attention_heads", 4)
    torch._dynamo.reset()
    model = build(kind, four_bit=four_bit)
    reference = step(model)
    apply_lora_kernel_patches(model, DictDefault(ALL))
    compile_layers(model)
    check_models(reference, step(model))
    assert sorted(launches) == ["_launch_backward"] * 4 + ["_launch_forward"] * 4


def test_memory_is_less_than_that_of_peft():
    def peak(model):
        step(model)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model)
        return torch.cuda.max_memory_allocated() - before

    model = build("llama")
    wanted = peak(model)
    apply_lora_kernel_patches(model, DictDefault(ALL))
    assert peak(model) < wanted
