"""Models come as the config says: dtype, size, what trains, what is frozen; and errors name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from axolotl.exceptions import ConfigError, ModelError
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.loaders import ModelLoader, load_model_config, load_tokenizer
from axolotl.loaders.model import read_dtype
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_base, make_tiny_model, make_tiny_tokenizer

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base"))


def load(base: Path, *, inference: bool = False, reference_model: bool = False, **keys):
    cfg = DictDefault({"base_model": str(base), "sequence_len": 64, "seed": 1, **keys})
    tokenizer = load_tokenizer(cfg)
    model, peft_config = ModelLoader(cfg, tokenizer, inference=inference, reference_model=reference_model).load()
    return cfg, model, peft_config


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def backward(model) -> None:
    ids = torch.arange(3, 35)[None]
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()


def test_full_training_trains_everything(base: Path) -> None:
    _, model, peft_config = load(base)
    assert peft_config is None
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert model.config.use_cache is False


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": True}, torch.bfloat16),
        ({"fp16": True}, torch.float32),  # gradients of fp16 weights cannot be unscaled
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
    ],
)
def test_dtype_of_the_weights(base: Path, keys: dict, dtype: torch.dtype) -> None:
    _, model, _ = load(base, **keys)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_lora_trains_only_its_matrices_in_fp32(base: Path) -> None:
    _, model, peft_config = load(base, bf16=True, **LORA)
    assert peft_config.r == 4
    assert trainable(model) == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}


@pytest.mark.parametrize(
    "keys",
    [
        {"adapter": "qlora", "load_in_4bit": True, "bf16": True},
        {"adapter": "qlora", "load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}},
        {"adapter": "lora", "load_in_8bit": True},
    ],
)
def test_quantized_base_with_lora_learns(base: Path, keys: dict) -> None:
    pytest.importorskip("bitsandbytes")
    _, model, _ = load(base, **{**LORA, **keys})
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert type(layer).__name__ == ("Linear4bit" if "load_in_4bit" in keys else "Linear8bitLt")
    if "load_in_4bit" in keys:
        assert layer.weight.quant_type == ("fp4" if "bnb_config_kwargs" in keys else "nf4")
    backward(model)
    grads = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_learn_under_gradient_checkpointing(base: Path, reentrant: bool) -> None:
    """Reentrant checkpointing drops the gradients of a frozen input unless the embedding's output asks for them."""
    _, model, _ = load(base, gradient_checkpointing=True, **LORA)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    backward(model)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_preference_trainers_get_the_config_and_a_plain_model(base: Path) -> None:
    _, model, peft_config = load(base, rl="dpo", **LORA)
    assert peft_config is not None
    assert type(model).__name__ == "LlamaForCausalLM"
    _, reference, none = load(base, reference_model=True, **LORA)
    assert none is None
    assert type(reference).__name__ == "LlamaForCausalLM"


def test_random_weights_follow_the_seed(base: Path) -> None:
    weights = [next(load(base, reinit_weights=True, seed=seed)[1].parameters()) for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_random_weights_need_only_a_config(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path)
    make_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    load(tmp_path, reinit_weights=True)
    with pytest.raises(ModelError, match="reinit_weights: true"):
        load(tmp_path)


def test_embeddings_grow_with_the_tokenizer_and_keep_their_rows(base: Path) -> None:
    cfg, model, _ = load(base, tokens=["<new>"], resize_token_embeddings_to_32x=True)
    assert model.get_input_embeddings().num_embeddings == 416
    assert model.get_output_embeddings().out_features == 416
    assert "embedding rows" in [choice.key for choice in cfg.resolution]
    _, plain, _ = load(base)
    torch.testing.assert_close(model.get_input_embeddings().weight[:384], plain.get_input_embeddings().weight)


def test_embeddings_shrink_only_when_asked(tmp_path: Path) -> None:
    make_tiny_tokenizer(tmp_path)
    make_tiny_model(tmp_path, vocab_size=400)
    assert load(tmp_path)[1].get_input_embeddings().num_embeddings == 400
    assert load(tmp_path, shrink_embeddings=True)[1].get_input_embeddings().num_embeddings == 384


def test_end_tokens_follow_the_tokenizer(base: Path) -> None:
    _, model, _ = load(base, special_tokens={"eos_token": "<|im_end|>"})
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 4


def test_positions_grow_to_the_sequence(base: Path) -> None:
    cfg, model, _ = load(base, sequence_len=1024)
    assert model.config.max_position_embeddings == 1024
    assert "max_position_embeddings" in [choice.key for choice in cfg.resolution]


def test_unfrozen_parameters(base: Path) -> None:
    _, model, _ = load(base, unfrozen_parameters=["^lm_head.weight$", "model.layers.1.mlp"])
    assert trainable(model) == {
        "lm_head.weight",
        *(f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }


def test_inference_keeps_the_cache_and_freezes_a_loaded_adapter(base: Path, tmp_path: Path) -> None:
    _, model, _ = load(base, **LORA)
    model.save_pretrained(tmp_path)
    _, loaded, _ = load(base, inference=True, lora_model_dir=str(tmp_path), **LORA)
    assert loaded.config.use_cache is True
    assert not any("lora_" in name for name in trainable(loaded))
    _, resumed, _ = load(base, lora_model_dir=str(tmp_path), **LORA)
    assert any("lora_" in name for name in trainable(resumed))


def test_overrides_of_the_config(base: Path) -> None:
    cfg = DictDefault(
        base_model=str(base),
        overrides_of_model_config={"rope_scaling": {"type": "linear", "factor": 2.0}, "attention_dropout": 0.1},
    )
    config = load_model_config(cfg)
    assert config.attention_dropout == 0.1
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.rope_parameters["factor"] == 2.0
    assert config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"type_of_model": "NoSuchModel"}, ConfigError, "type_of_model: NoSuchModel"),
        ({"type_of_model": "AutoModelForSeq2SeqLM"}, ModelError, "cannot build"),
        ({"attn_implementation": "sage"}, ConfigError, "flash_attention_2"),
        ({"attn_implementation": "nonsense"}, ConfigError, "is not known"),
        ({"gptq": True}, ConfigError, "not quantized with GPTQ"),
        ({"unfrozen_parameters": ["no.such"]}, ConfigError, "matches no parameter"),
    ],
)
def test_errors_name_the_key(base: Path, keys: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(base, **keys)


def test_missing_weights_and_configs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_model_config(DictDefault(base_model=str(tmp_path / "nowhere")))
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ModelError, match=r"no config.json \(it holds notes.txt\)"):
        load_model_config(DictDefault(base_model=str(tmp_path)))


def test_packing_with_recurrent_layers_is_refused(tmp_path: Path) -> None:
    from transformers import Mamba2Config

    make_tiny_tokenizer(tmp_path)
    Mamba2Config(num_heads=4, head_dim=16, hidden_size=32, num_hidden_layers=1, vocab_size=384).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match="carry a state"):
        load(tmp_path, sample_packing=True, reinit_weights=True)


def test_plugins_are_asked_in_the_documented_order(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Recorder(BasePlugin):
        def pre_model_load(self, cfg):
            calls.append("pre_model_load")

        def post_model_build(self, cfg, model):
            calls.append(f"post_model_build {type(model).__name__}")

        def pre_lora_load(self, cfg, model):
            calls.append(f"pre_lora_load {type(model).__name__}")

        def post_lora_load(self, cfg, model):
            calls.append(f"post_lora_load {type(model).__name__}")

        def post_model_load(self, cfg, model):
            calls.append(f"post_model_load {type(model).__name__}")

    monkeypatch.setitem(PluginManager.get_instance().plugins, "recorder", Recorder())
    load(base, **LORA)
    assert calls == [
        "pre_model_load",
        "post_model_build LlamaForCausalLM",
        "pre_lora_load LlamaForCausalLM",
        "post_lora_load PeftModelForCausalLM",
        "post_model_load PeftModelForCausalLM",
    ]


@pytest.mark.parametrize(
    ("config", "training", "answering"),
    [
        ({"fp16": True, "torch_dtype": torch.float16}, torch.float32, torch.float16),
        ({"fp16": True, "torch_dtype": torch.float16, "adapter": "lora"}, torch.float16, torch.float16),
        ({"float16": True, "torch_dtype": torch.float16}, torch.float16, torch.float16),
        ({"bf16": True, "torch_dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
        ({"fp16": True}, torch.float32, torch.float16),
    ],
)
def test_weights_that_train_under_a_loss_scaler_are_float32(config, training, answering):
    assert read_dtype(DictDefault(config)) == training
    assert read_dtype(DictDefault(config), inference=True) == answering
