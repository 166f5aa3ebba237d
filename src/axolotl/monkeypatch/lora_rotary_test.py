"""Which attentions rotate right after projecting, and compiled layers in which an operator does both."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers.models.llama import modeling_llama

from axolotl.kernels import lora_ops
from axolotl.monkeypatch.fp8_base import apply_fp8_base
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches, get_layers, remove_lora_kernel_patches
from axolotl.monkeypatch.lora_rotary import Rotation, find_rotation
from axolotl.utils.dict import DictDefault

LAYERS = 2
SHAPE = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "use_cache": False,
}  # fmt: skip
KERNELS = {"lora_qkv_kernel": True, "lora_o_kernel": True, "lora_mlp_kernel": True}


def build_base(name: str, **config) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**SHAPE, **config}))


def build(name: str = "LlamaConfig", *, lora: dict | None = None, **config) -> nn.Module:
    model = build_base(name, **config)
    model = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **(lora or {})})
    )
    for path, parameter in model.named_parameters():
        if "lora_B" in path or "bias" in path:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def step(model: nn.Module, rows: int = 2, length: int = 17, positions: torch.Tensor | None = None):
    model.zero_grad()
    ids = torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids, position_ids=positions).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, wanted) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=1e-5)
    assert got[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture
def rotations(monkeypatch) -> list[int]:
    """One entry for every call of the operator that rotates."""
    calls, forward = [], lora_ops.lora_rotary_forward
    monkeypatch.setattr(lora_ops, "lora_rotary_forward", lambda *args: calls.append(1) or forward(*args))
    torch._dynamo.reset()
    counters.clear()
    yield calls
    torch._dynamo.reset()


def compile_whole(model: nn.Module) -> None:
    for layer in get_layers(model):
        layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)


# --- compiled layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Qwen2Config"])
def test_compiled_layers_rotate_in_an_operator(name, checkpointing, rotations):
    model = build(name)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wanted = step(model)
    apply_lora_kernel_patches(model, DictDefault(KERNELS))
    assert_same(step(model), wanted)
    assert not rotations, "eager layers do not"
    compile_whole(model)
    assert_same(step(model), wanted)
    assert len(rotations) == (2 * LAYERS if checkpointing else LAYERS)
    # The input of the first layer has no gradient unless checkpointing asks for it.
    assert counters["stats"]["unique_graphs"] == (1 if checkpointing else 2)


@pytest.mark.parametrize(
    "lora",
    [
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 32}},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["k_proj"]},
    ],
)
def test_ranks_may_differ_and_be_none(lora, rotations):
    model = build("Qwen2Config", lora=lora)
    wanted = step(model)
    apply_lora_kernel_patches(model, DictDefault(KERNELS))
    compile_whole(model)
    assert_same(step(model), wanted)
    assert len(rotations) == LAYERS


def test_rows_of_any_shape_and_packed_ones(rotations):
    model = build()
    batches = [
        (2, 16, None),
        (1, 30, torch.cat([torch.arange(11), torch.arange(19)])[None]),
        (3, 8, torch.stack([torch.arange(8), torch.arange(8) + 3, torch.arange(8)])),
    ]
    wanted = [step(model, *batch) for batch in batches]
    apply_lora_kernel_patches(model, DictDefault(KERNELS))
    compile_whole(model)
    for batch, right in zip(batches, wanted, strict=True):
        assert_same(step(model, *batch), right)
    assert len(rotations) == LAYERS * len(batches)
    assert not counters["graph_break"]


def test_weights_in_fp8(rotations):
    model = build(head_dim=16, hidden_size=64)
    apply_lora_kernel_patches(model, DictDefault(KERNELS))
    apply_fp8_base(model, DictDefault(KERNELS))
    wanted = step(model)
    compile_whole(model)
    assert_same(step(model), wanted)
    assert len(rotations) == LAYERS


def test_what_does_not_fit_later_runs_as_its_layers_do(rotations):
    model = build()
    apply_lora_kernel_patches(model, DictDefault(KERNELS))
    get_layers(model)[1].self_attn.k_proj.base_layer.weight.requires_grad_(True)
    wanted = step(model)
    compile_whole(model)
    assert_same(step(model), wanted)
    assert len(rotations) == LAYERS - 1


def test_a_rotation_that_is_replaced_later_is_used(rotations, monkeypatch):
    model = build()
    before = step(model)
    apply_lora_kernel_patches(model, DictDefault(KERNELS))
    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: own(q, k, cos, -sin))
    wanted = step(model)
    assert wanted[0] != before[0]
    compile_whole(model)
    assert_same(step(model), wanted)
    assert not rotations
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", own)
    assert_same(step(model), before)
    assert len(rotations) == LAYERS


def test_what_else_is_replaced_later_is_used(rotations, monkeypatch):
    model = build(attn_implementation="eager")
    apply_lora_kernel_patches(model, DictDefault(KERNELS))
    own = modeling_llama.eager_attention_forward

    def doubled(*args, **kwargs):
        output, weights = own(*args, **kwargs)
        return 2 * output, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", doubled)
    wanted = step(model)
    compile_whole(model)
    assert_same(step(model), wanted)
    assert len(rotations) == LAYERS


def test_taken_back(rotations):
    model = build()
    wanted = step(model)
    own = modeling_llama.LlamaAttention.forward, modeling_llama.apply_rotary_pos_emb
    apply_lora_kernel_patches(model, DictDefault(KERNELS))
    remove_lora_kernel_patches(model)
    assert own == (modeling_llama.LlamaAttention.forward, modeling_llama.apply_rotary_pos_emb)
    compile_whole(model)
    assert_same(step(model), wanted)
    assert not rotations


# --- which attentions -------------------------------------------------------------------------------------------------


def found(model: nn.Module, layer: int = 0) -> Rotation | str:
    attention = get_layers(model)[layer].self_attn
    return find_rotation(attention, type(attention).forward)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("LlamaConfig", {}, None),
        ("MistralConfig", {"sliding_window": 8}, None),
        ("Qwen2Config", {}, None),
        ("Gemma2Config", {"head_dim": 8}, None),
        ("Qwen3Config", {"head_dim": 8}, "changes queries or keys"),
        ("Gemma3TextConfig", {"head_dim": 8}, "changes queries or keys"),
        ("Olmo2Config", {}, "cannot be followed"),
        ("OlmoConfig", {"clip_qkv": 8.0}, "changes queries or keys"),
        ("StableLmConfig", {}, "changes queries or keys"),
        ("CohereConfig", {}, "another one"),
        ("GlmConfig", {"head_dim": 8}, "another one"),
    ],
)
def test_attentions_of_models(name, config, reason):
    rotation = found(build_base(name, **config))
    assert isinstance(rotation, Rotation) if reason is None else reason in rotation


def test_every_layer_is_asked():
    model = build_base("SmolLM3Config", num_hidden_layers=3, no_rope_layers=[1, 0, 1])
    assert [isinstance(found(model, layer), Rotation) for layer in range(3)] == [True, False, True]


def make_attention(body: str) -> tuple[nn.Module, object]:
    """A Llama attention whose forward is another, in the same module."""
    attention = get_layers(build_base("LlamaConfig"))[0].self_attn
    source = f"def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):\n{body}"
    names: dict = {}
    exec(compile(source, modeling_llama.__file__, "exec"), modeling_llama.__dict__, names)
    return attention, names["forward"]


PROJECT = """
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
    cos, sin = position_embeddings
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (PROJECT + "    q, k = apply_rotary_pos_emb(q, k, cos, sin)\n", None),
        (PROJECT + "    q, k = apply_rotary_pos_emb(q, k.clamp(-50, 50), cos, sin)\n", "changes queries or keys"),
        (PROJECT + "    q, k = apply_rotary_pos_emb(2 * q, k, cos, sin)\n", "changes queries or keys"),
        (PROJECT + "    q, k = apply_rotary_pos_emb(k, q, cos, sin)\n", "changes queries or keys"),
        (PROJECT + "    q, k = apply_rotary_pos_emb(q, k, cos, -sin)\n", "by what it is given"),
        (PROJECT + "    q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)\n", "by what it is given"),
        (PROJECT + "    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k, cos, sin)\n", "changes queries or keys"),
        (PROJECT + "    q, _ = apply_rotary_pos_emb(q, q, cos, sin)\n    _, k = apply_rotary_pos_emb(k, k, cos, sin)\n", "one `apply_rotary_pos_emb`"),
        ("    q = self.q_proj(2 * hidden_states)\n    return apply_rotary_pos_emb(q, q, *position_embeddings)\n", "by what it is given"),
        ("    return self.q_proj.weight, apply_rotary_pos_emb\n", "cannot be followed"),
        ("    return self.o_proj(hidden_states)\n", "one `apply_rotary_pos_emb`"),
    ],
)  # fmt: skip
def test_forwards(body, reason):
    rotation = find_rotation(*make_attention(body))
    assert isinstance(rotation, Rotation) if reason is None else reason in rotation


def test_a_replaced_rotation_is_left_alone(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    attention, forward = make_attention(PROJECT + "    q, k = apply_rotary_pos_emb(q, k, cos, sin)\n")
    assert "somebody else" in find_rotation(attention, forward)
