"""Whole models with the LoRA kernels against the same models without."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters

from axolotl.kernels.lora import apply_lora_mlp_geglu, apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv
from axolotl.monkeypatch.lora_kernels import (
    FakeMLP,
    apply_lora_kernel_patches,
    get_attention_cls_from_config,
    get_layers,
    patch_self_attn_lora,
    remove_lora_kernel_patches,
)
from axolotl.utils.dict import DictDefault

SHAPE = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
}
ALL = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True, "lora_embedding_kernel": True}
IDS = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(0))


def build(kind: str = "llama", *, config: dict | None = None, **lora):
    torch.manual_seed(0)
    name, own = MODELS[kind]
    base = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**{**SHAPE, **own, **(config or {})})
    )
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    model = get_peft_model(base, LoraConfig(**lora))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name or "lora_embedding_" in parameter_name or "bias" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def step(model, autocast: bool = False):
    """Loss and the gradients of one step, by name."""
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / a[name].norm().clamp_min(1e-8)) for name in a)


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_peft(kind):
    model, cfg = build(kind), DictDefault(ALL)
    loss, grads = step(model)
    apply_lora_kernel_patches(model, cfg)
    assert cfg.resolution is None, "every layer runs fused"
    fused_loss, fused = step(model)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert distance(grads, fused) < 1e-5
    assert distance(grads, fused) > 0, "nothing was patched"


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_under_autocast(kind):
    model = build(kind)
    loss, grads = step(model, autocast=True)
    fused_loss, fused = step(apply_lora_kernel_patches(model, DictDefault(ALL)), autocast=True)
    assert fused_loss == pytest.approx(loss, rel=2e-3)
    assert distance(grads, fused) < 0.05


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant):
    model = build()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    loss, grads = step(model)
    fused_loss, fused = step(apply_lora_kernel_patches(model, DictDefault(ALL)))
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert distance(grads, fused) < 1e-5


@pytest.mark.parametrize(
    "lora, reason",
    [
        ({"lora_dropout": 0.3}, "has dropout"),
        ({"use_dora": True}, "is a Dora"),
        ({"target_modules": ["q_proj", "gate_proj"]}, "has no adapter"),
    ],
)
def test_layers_that_do_not_fit_run_plainly_and_are_named(lora, reason):
    model, cfg = build(**lora), DictDefault(ALL)
    loss, grads = step(model)
    fused_loss, fused = step(apply_lora_kernel_patches(model, cfg))
    assert reason in " ".join(choice["reason"] for choice in cfg.resolution)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert distance(grads, fused) < 1e-5


def test_trained_biases_get_their_gradient():
    model, cfg = build("qwen2", bias="all"), DictDefault(ALL)
    loss, grads = step(model)
    fused_loss, fused = step(apply_lora_kernel_patches(model, cfg))
    assert any(name.endswith("q_proj.base_layer.bias") for name in fused)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert distance(grads, fused) < 1e-5


def test_unfreezing_later_is_seen():
    model = apply_lora_kernel_patches(build(), DictDefault(ALL))
    layer = get_layers(model)[0]
    weights = [layer.mlp.up_proj.base_layer.weight, layer.self_attn.k_proj.base_layer.weight]
    for weight in weights:
        weight.requires_grad_(True)
    step(model)
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)


def test_ranks_may_differ():
    model = build(rank_pattern={"k_proj": 2, "up_proj": 3}, alpha_pattern={"q_proj": 32})
    loss, grads = step(model)
    fused_loss, fused = step(apply_lora_kernel_patches(model, DictDefault(ALL)))
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert distance(grads, fused) < 1e-5


def test_embedding_adapter():
    model, cfg = build(target_modules=["embed_tokens", "q_proj", "v_proj"]), DictDefault(ALL)
    loss, grads = step(model)
    fused_loss, fused = step(apply_lora_kernel_patches(model, cfg))
    assert (
        "LoRA_Embedding"
        in type(model.get_input_embeddings()(IDS).grad_fn.next_functions[0][0]).__name__
        + type(model.get_input_embeddings()(IDS).grad_fn).__name__
    )
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert distance(grads, fused) < 1e-5


def test_switched_off_adapters_give_the_base_model():
    model = build()
    with torch.no_grad(), model.disable_adapter():
        wanted = model(input_ids=IDS).logits
    apply_lora_kernel_patches(model, DictDefault(ALL))
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted)


def test_generation_and_merging_still_work():
    model = build().eval()
    keywords = {"max_new_tokens": 5, "do_sample": False}
    wanted = model.generate(input_ids=IDS, **keywords)
    logits = model(input_ids=IDS).logits
    apply_lora_kernel_patches(model, DictDefault(ALL))
    assert torch.equal(model.generate(input_ids=IDS, **keywords), wanted)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)


def test_a_copy_uses_its_own_weights():
    model = apply_lora_kernel_patches(build(), DictDefault(ALL))
    other = copy.deepcopy(model)
    loss, _ = step(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert step(other)[0] == loss


def test_applied_twice_and_taken_back():
    model = build()
    loss, grads = step(model)
    before = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
    for _ in range(2):
        apply_lora_kernel_patches(model, DictDefault(ALL))
    assert step(model)[0] == pytest.approx(loss, rel=1e-5)
    remove_lora_kernel_patches(model)
    assert {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()} == before
    again, grads_again = step(model)
    assert again == loss and distance(grads, grads_again) == 0


@pytest.mark.parametrize("key", ["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"])
def test_each_key_patches_its_own(key):
    layer = get_layers(apply_lora_kernel_patches(build(), DictDefault({key: True})))[0]
    on = {
        "lora_mlp_kernel": getattr(layer.mlp.forward, "__func__", None) is apply_lora_mlp_swiglu,
        "lora_qkv_kernel": layer.self_attn.apply_qkv.__func__ is apply_lora_qkv,
        "lora_o_kernel": layer.self_attn.apply_o.__func__ is apply_lora_o,
    }
    assert [name for name, is_on in on.items() if is_on] == [key]


def test_gemma_gets_the_gelu_it_was_trained_with():
    mlp = get_layers(apply_lora_kernel_patches(build("gemma2"), DictDefault(ALL)))[0].mlp
    assert mlp.forward.__func__ is apply_lora_mlp_geglu
    assert mlp.gelu_approximate == "tanh"


def test_an_mlp_that_computes_something_else_is_left_alone(monkeypatch):
    model, cfg = build(), DictDefault(ALL)
    mlp_cls = type(get_layers(model)[0].mlp)
    original = mlp_cls.forward
    monkeypatch.setattr(mlp_cls, "forward", lambda self, x: 1.1 * original(self, x))
    apply_lora_kernel_patches(model, cfg)
    assert "computes more than" in cfg.resolution[0]["reason"]
    assert "forward" not in get_layers(model)[0].mlp.__dict__


def test_projections_called_by_themselves_compute_by_themselves():
    model = build()
    attention = get_layers(model)[0].self_attn
    x = torch.randn(2, 3, 32)
    wanted = [attention.q_proj(x), attention.k_proj(2 * x), attention.o_proj(x)]
    apply_lora_kernel_patches(model, DictDefault(ALL))
    got = [attention.q_proj(x), attention.k_proj(2 * x), attention.o_proj(x)]
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(next(iter(attention.apply_qkv(x))), wanted[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_compile_once_and_whole(checkpointing):
    model = build(config={"num_hidden_layers": 4})
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, grads = step(model)
    apply_lora_kernel_patches(model, DictDefault(ALL))
    torch._dynamo.reset()
    counters.clear()
    for layer in get_layers(model):
        layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    fused_loss, fused = step(model)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert distance(grads, fused) < 1e-5
    # The input of the first layer has no gradient unless checkpointing asks for it.
    assert counters["stats"]["unique_graphs"] == (1 if checkpointing else 2)


def test_a_model_that_the_kernels_do_not_fit_is_said_so():
    torch.manual_seed(0)
    config = transformers.Phi3Config(**SHAPE)
    model = get_peft_model(transformers.Phi3ForCausalLM(config), LoraConfig(target_modules="all-linear"))
    cfg = DictDefault({"lora_mlp_kernel": True})
    apply_lora_kernel_patches(model, cfg)
    assert cfg.resolution[0]["value"] is False and "one layer" in cfg.resolution[0]["reason"]


def test_needs_a_model_of_peft():
    with pytest.raises(TypeError, match="PeftModel"):
        apply_lora_kernel_patches(nn.Linear(2, 2), DictDefault(ALL))


@pytest.mark.parametrize("kind", MODELS)
def test_attention_class_of_a_config(tmp_path, kind):
    model = build(kind)
    model.get_base_model().config.save_pretrained(tmp_path)
    found = get_attention_cls_from_config(DictDefault(base_model=str(tmp_path)))
    assert type(get_layers(model)[0].self_attn) is found


def test_attention_class_is_patched_by_config(tmp_path, monkeypatch):
    transformers.LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    cfg = DictDefault(base_model=str(tmp_path))
    attention_cls = get_attention_cls_from_config(cfg)
    original = attention_cls.forward
    monkeypatch.setattr(attention_cls, "forward", original)  # puts it back
    model = build()
    loss, grads = step(model)
    try:
        patch_self_attn_lora(cfg)
        patch_self_attn_lora(cfg)
        assert attention_cls.forward.__name__ == "axolotl_attn_forward"
        assert attention_cls._original_forward is original
        assert step(model)[0] == loss
        fused_loss, fused = step(apply_lora_kernel_patches(model, DictDefault(ALL)))
        assert fused_loss == pytest.approx(loss, rel=1e-5) and distance(grads, fused) < 1e-5
    finally:
        del attention_cls._original_forward


def test_an_attention_that_needs_to_be_itself_is_left_alone():
    class Keeps(transformers.models.llama.modeling_llama.LlamaAttention):
        def forward(self, *args, **kwargs):
            self.seen = True
            return super().forward(*args, **kwargs)

    model, cfg = build(), DictDefault({"lora_qkv_kernel": True})
    get_layers(model)[0].self_attn.__class__ = Keeps
    loss, grads = step(model)
    fused_loss, fused = step(apply_lora_kernel_patches(model, cfg))
    assert cfg.resolution[0]["value"] == "1 of 2 attention layers"
    assert get_layers(model)[0].self_attn.seen
    assert fused_loss == pytest.approx(loss, rel=1e-5) and distance(grads, fused) < 1e-5


def test_fake_mlp():
    mlp = FakeMLP(nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)).requires_grad_(False)
    x = torch.randn(3, 4)
    wanted = mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), wanted)
