"""The forecast against bytes that autograd really keeps, and against peaks measured on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from axolotl.monkeypatch.compile_layers import compile_layers
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
from axolotl.monkeypatch.tiled_mlp import apply_tiled_mlp
from axolotl.plan_run import count_norms, decoder_layers, linear_input_features
from axolotl.utils.dict import DictDefault
from axolotl.utils.forecast import (
    GIB,
    LayerShape,
    Run,
    bytes_per_quantized_weight,
    cast_bytes,
    forecast,
    layer_bytes,
    optimizer_bytes,
    weight_bytes,
)

TOKENS = 64
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def kept_bytes(model, autocast: bool) -> int:
    """Bytes of distinct storages that autograd keeps after a forward pass, without those of parameters."""
    params = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(TOKENS).reshape(1, -1) % 64
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        output = model(input_ids=ids, use_cache=False).logits
    assert output.requires_grad
    return sum(kept.values())


def build(config_class, num_layers, *, lora, dtype, attention="sdpa"):
    torch.manual_seed(0)
    config = config_class(num_hidden_layers=num_layers, **SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train()


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_kept_by_a_layer(config_class, lora, dtype):
    """Three layers minus one layer: what two layers keep. Qwen3 also normalises q and k, which the forecast leaves out."""
    one, three = (
        kept_bytes(build(config_class, n, lora=lora, dtype=dtype), autocast=dtype != torch.float32) for n in (1, 3)
    )
    measured = (three - one) / 2 / TOKENS
    model = build(config_class, 1, lora=lora, dtype=dtype)
    layer = decoder_layers(model)[0]
    shape = LayerShape(
        hidden=64,
        intermediate=160,
        attention=64,
        key_value=32,
        num_norms=count_norms(layer, 64),
        linear_inputs=linear_input_features(layer, own_copies=lora and dtype != torch.float32),
    )
    run = Run(
        layer=shape,
        num_layers=1,
        vocab=64,
        tokens=TOKENS,
        row_length=TOKENS,
        num_params=0,
        num_trained=0,
        is_adapter=lora,
        compute_bytes=dtype.itemsize,
        num_heads=4,
    )
    tolerance = 0.05 if config_class is LlamaConfig else 0.30
    assert layer_bytes(run) == pytest.approx(measured, rel=tolerance)


KERNEL_KEYS = DictDefault(lora_mlp_kernel=True, lora_qkv_kernel=True, lora_o_kernel=True)


@pytest.mark.parametrize("kind", ["kernels", "lora", "full"])
def test_bytes_kept_by_a_compiled_layer(kind):
    """The partition into what is kept and what is computed again is the compiler's; only code generation is left out."""
    torch._dynamo.reset()
    kept = []
    for num_layers in (1, 3):
        model = build(LlamaConfig, num_layers, lora=kind != "full", dtype=torch.bfloat16)
        if kind == "kernels":
            apply_lora_kernel_patches(model, KERNEL_KEYS)
        compile_layers(model, {"backend": "aot_eager_decomp_partition"})
        kept.append(kept_bytes(model, autocast=True))
    layer = decoder_layers(model)[0]
    inputs = linear_input_features(layer, own_copies=False) - 7 * 4 + 64 if kind == "lora" else 0
    shape = LayerShape(
        hidden=64, intermediate=160, attention=64, key_value=32, linear_inputs=inputs, ranks=0 if kind == "full" else 7 * 4
    )  # fmt: skip
    run = Run(
        layer=shape, num_layers=1, vocab=64, tokens=TOKENS, row_length=TOKENS, num_params=0,
        num_trained=sum(p.numel() for p in layer.parameters() if p.requires_grad), is_adapter=kind != "full",
        trained_bytes=4, num_heads=4, compiled=True, lora_kernels=kind == "kernels",
    )  # fmt: skip
    # The casts of adapters, which the kernels take, are the same for any number of tokens, and at 64 tokens they show.
    casts = cast_bytes(run) if run.lora_kernels else 0
    expected = layer_bytes(run) + casts / TOKENS
    assert expected == pytest.approx((kept[1] - kept[0]) / 2 / TOKENS, rel=0.05)


def llama_8b(**changes) -> Run:
    """Llama-3.1-8B, rank-16 adapters on all linear layers, micro-batch 2 of 4096 tokens, fused norms and SwiGLU."""
    adapters = 41_943_040
    run = Run(
        layer=LayerShape(4096, 14336, 4096, 1024, linear_inputs=2 * 4096 + 14336 + 7 * 16),
        num_layers=32,
        vocab=128256,
        tokens=8192,
        row_length=4096,
        num_params=8_030_261_248 + adapters,
        num_trained=adapters,
        num_quantized=6_979_321_856,
        largest_linear=4096 * 14336,
        embedding_params=128256 * 4096,
        is_adapter=True,
        trained_bytes=4,
        num_heads=32,
        fused_norm=True,
        fused_glu="glu",
        head_trained=False,
    )
    return dataclasses.replace(run, **changes)


OWN_COPIES = LayerShape(4096, 14336, 4096, 1024, linear_inputs=6 * 4096 + 14336 + 7 * 16)
KERNELS = {"layer": LayerShape(4096, 14336, 4096, 1024, linear_inputs=2 * 4096 + 7 * 16), "fused_glu": "mlp"}


@pytest.mark.parametrize(
    ("changes", "measured_gib"),
    [
        ({"layer": OWN_COPIES}, 58.8),  # float32 adapters, written out
        ({"trained_bytes": 2}, 50.6),  # bfloat16 adapters share their inputs
        (KERNELS, 43.1),  # fused LoRA kernels
        (KERNELS | {"checkpointing": True}, 18.8),
        (KERNELS | {"weight_bits": 4}, 33.6),
    ],
)
def test_peaks_measured_on_an_h200(changes, measured_gib):
    """`max_memory_allocated` of single H200 runs, torch 2.11."""
    assert forecast(llama_8b(**changes)).allocated / GIB == pytest.approx(measured_gib, rel=0.04)


def test_the_1b_peak_measured_on_an_h200():
    run = llama_8b(
        layer=LayerShape(2048, 8192, 2048, 512, linear_inputs=2 * 2048 + 7 * 16),
        num_layers=16,
        fused_glu="mlp",
        num_params=1_235_814_400 + 11_272_192,
        num_trained=11_272_192,
    )
    assert forecast(run).allocated / GIB == pytest.approx(10.0, rel=0.08)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_bytes_of_a_four_bit_weight(quant_type, double):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(1024, 1024)
    packed, state = functional.quantize_4bit(weight, compress_statistics=double, quant_type=quant_type)
    size = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    assert bytes_per_quantized_weight(4, double) == pytest.approx(size / weight.numel(), rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adagrad", "sgd"])
def test_optimizer_states_are_those_torch_makes(name):
    weight = torch.nn.Parameter(torch.randn(256, 256))
    classes = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}
    optimizer = classes.get(name, torch.optim.SGD)([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    states = [s for state in optimizer.state.values() for s in state.values() if torch.is_tensor(s) and s.numel() > 1]
    run = llama_8b(num_trained=weight.numel(), optimizer=name)
    assert optimizer_bytes(run) == sum(s.nbytes for s in states)


def test_full_training_counts_every_state_once():
    run = llama_8b(is_adapter=False, num_params=10**9, num_trained=10**9, trained_bytes=2, num_quantized=0)
    needed = forecast(run)
    assert (needed.weights, needed.adapters, needed.gradients, needed.optimizer) == (2e9, 0, 2e9, 4e9)


def test_sharding_divides_what_stays():
    whole, split = llama_8b(), llama_8b(shard_weights=8, shard_gradients=8, shard_optimizer=8)
    assert weight_bytes(split)[0] < weight_bytes(whole)[0] / 4
    assert forecast(split).optimizer == forecast(whole).optimizer / 8


def test_eager_attention_grows_with_the_square_of_the_length():
    short, long = (forecast(llama_8b(attention_kind="eager", tokens=n, row_length=n)).activations for n in (4096, 8192))
    assert long / short > 3


@pytest.mark.parametrize("num_shards", [2, 8])
def test_a_tiled_layer_keeps_no_wide_tensors(num_shards):
    kept = []
    for num_layers in (1, 3):
        model = build(LlamaConfig, num_layers, lora=False, dtype=torch.float32)
        apply_tiled_mlp(model, num_shards)
        kept.append(kept_bytes(model, autocast=False))
    per_token = (kept[1] - kept[0]) / 2 / TOKENS
    layer = LayerShape(
        hidden=64, intermediate=160, attention=64, key_value=32,
        linear_inputs=linear_input_features(decoder_layers(model)[0], own_copies=False, recompute_mlp=True),
    )  # fmt: skip
    run = Run(
        layer=layer, num_layers=3, vocab=64, tokens=TOKENS, row_length=TOKENS, num_params=0, num_trained=0,
        compute_bytes=4, num_heads=4, mlp_tiles=num_shards,
    )  # fmt: skip
    assert layer_bytes(run) == pytest.approx(per_token, rel=0.1)


def test_the_first_input_stays_where_the_embedding_is_frozen():
    """Everything that autograd saves leaves; the input of the first layer is a leaf whose gradient is accumulated."""
    model = build(LlamaConfig, 3, lora=True, dtype=torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    inputs = []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        loss = model(input_ids=torch.arange(8)[None], use_cache=False).logits.sum()
    assert loss.requires_grad
    assert [reference() is not None for reference in inputs] == [True, False, False]


def test_every_knob_makes_the_run_smaller_by_what_it_moves():
    plain = llama_8b()
    checkpointed = dataclasses.replace(plain, checkpointing=True)
    kept = dataclasses.replace(checkpointed, keeps_attention=True)
    sizes = [
        forecast(run).activations
        for run in (
            dataclasses.replace(checkpointed, offload=True),
            checkpointed,
            dataclasses.replace(kept, keeps_on_host=True),
            kept,
            dataclasses.replace(checkpointed, checkpoint_every=2),
            plain,
        )
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
    on_host = dataclasses.replace(plain, layers_on_host=True)
    moved = plain.num_quantized * plain.weight_bytes * (1 - 2 / plain.num_layers)
    assert weight_bytes(plain)[0] - weight_bytes(on_host)[0] == pytest.approx(moved)
    long = dataclasses.replace(checkpointed, tokens=131072, row_length=131072)
    assert forecast(dataclasses.replace(long, mlp_tiles=32)).total < forecast(long).total
    assert forecast(dataclasses.replace(plain, loss_rows=128)).loss < forecast(plain).loss
