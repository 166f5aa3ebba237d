"""The LoRA keys reach peft, and targets that match nothing are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from axolotl.exceptions import ConfigError, ModelError
from axolotl.loaders.adapter import (
    build_lora_config,
    find_all_linear_names,
    load_adapter,
    load_lora,
    setup_quantized_meta_for_peft,
    setup_quantized_peft_meta_for_training,
)
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_llama

ALL_LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture
def model(tmp_path: Path):
    return make_tiny_llama(tmp_path / "base")


def config(**keys) -> DictDefault:
    return DictDefault({"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **keys})


def targeted(model) -> set[str]:
    return {
        name.split(".lora_A")[0].removeprefix("base_model.model.")
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }


def test_all_linear_layers_but_the_output(model) -> None:
    assert find_all_linear_names(model) == ALL_LINEAR
    cfg = config(lora_target_linear=True)
    adapted, _ = load_lora(model, cfg)
    assert len(targeted(adapted)) == 2 * 7
    assert "lora_target_modules" in [choice.key for choice in cfg.resolution]


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["q_proj", "v_proj"], {f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")}),
        (
            r"model.layers.[\d]+.mlp.(up|down)_proj",
            {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("up_proj", "down_proj")},
        ),
        (
            [r"model.layers.1.self_attn.[qk]_proj"],
            {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"},
        ),
    ],
)
def test_targets_are_names_or_regular_expressions(model, modules, expected: set[str]) -> None:
    assert targeted(load_lora(model, config(lora_target_modules=modules))[0]) == expected


def test_target_modules_add_to_all_linear_layers(model) -> None:
    built = build_lora_config(model, config(lora_target_linear=True, lora_target_modules=["lm_head"]))
    assert built.target_modules == {*ALL_LINEAR, "lm_head"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_target_modules": ["q_prj"]}, "Did you mean q_proj"),
        ({"lora_target_modules": "model.blocks.*q_proj"}, "matches nothing in the model"),
        ({"lora_target_linear": True, "lora_modules_to_save": ["wte"]}, "lora_modules_to_save"),
        ({"lora_target_parameters": ["experts.gate"]}, "lora_target_parameters"),
    ],
)
def test_targets_that_match_nothing(model, keys: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_lora_config(model, config(**keys))


def test_errors_of_the_config(model) -> None:
    with pytest.raises(ConfigError, match="has no target"):
        build_lora_config(model, config())
    with pytest.raises(ConfigError, match="not a regular expression"):
        build_lora_config(model, config(lora_target_modules="("))
    with pytest.raises(ConfigError, match="`adapter: mystery`"):
        load_adapter(model, config(), "mystery")


@pytest.mark.parametrize("excluded", ["nope.*", ["q_proj", "nope"]])
def test_exclusions_that_exclude_nothing_are_said(model, excluded, monkeypatch) -> None:
    said = []
    monkeypatch.setattr("axolotl.loaders.adapter_config.LOG.warning", said.append)
    build_lora_config(model, config(lora_target_linear=True, lora_exclude_modules=excluded))
    assert len(said) == 1
    assert said[0].startswith("`lora_exclude_modules`: nope")


def test_every_key_reaches_peft(model) -> None:
    built = build_lora_config(
        model,
        config(
            lora_target_linear=True,
            lora_dropout=0.1,
            lora_fan_in_fan_out=True,
            lora_modules_to_save=["embed_tokens", "lm_head"],
            lora_rank_pattern={"q_proj": 2},
            lora_alpha_pattern={"q_proj": 4},
            lora_exclude_modules=["o_proj"],
            peft_use_dora=True,
            peft_use_rslora=True,
            peft_init_lora_weights="gaussian",
            peft_layers_to_transform=[0],
            peft_layers_pattern=["layers"],
            peft_trainable_token_indices=[1, 2],
            peft_ensure_weight_tying=True,
        ),
    )
    expected = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "fan_in_fan_out": True,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 4},
        "exclude_modules": {"o_proj"},
        "use_dora": True,
        "use_rslora": True,
        "init_lora_weights": "gaussian",
        "layers_to_transform": [0],
        "layers_pattern": ["layers"],
        "trainable_token_indices": [1, 2],
        "ensure_weight_tying": True,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    assert {name: getattr(built, name) for name in expected} == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_starts_nearer_to_the_base_than_rounding_alone(model, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    plain = {name: weight.clone() for name, weight in model.state_dict().items()}
    keys = {"lora_target_modules": ["down_proj"], "lora_alpha": 32, "peft": {"loftq_config": {"loftq_bits": bits}}}
    adapted, _ = load_lora(model, config(**keys))
    layer = adapted.base_model.model.model.layers[0].mlp.down_proj
    original, rounded = plain["model.layers.0.mlp.down_proj.weight"], layer.base_layer.weight
    start = rounded + layer.get_delta_weight("default")
    assert 0 < (start - original).norm() < 0.9 * (rounded - original).norm()


def test_layer_replication_stacks_layers(model) -> None:
    adapted, _ = load_lora(model, config(lora_target_linear=True, peft_layer_replication=[[0, 2], [1, 2]]))
    assert len(adapted.base_model.model.model.layers) == 3


def test_pissa_leaves_the_function_of_the_model_alone(model) -> None:
    ids = torch.arange(3, 20)[None]
    before = model(input_ids=ids).logits.detach()
    adapted, _ = load_lora(model, config(lora_target_linear=True, peft_init_lora_weights="pissa"))
    torch.testing.assert_close(adapted(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


def test_layers_to_transform(model) -> None:
    adapted, _ = load_lora(model, config(lora_target_modules=["q_proj"], peft_layers_to_transform=[1]))
    assert targeted(adapted) == {"model.layers.1.self_attn.q_proj"}


def test_config_only_leaves_the_model_alone(model) -> None:
    none, built = load_lora(model, config(lora_target_linear=True), config_only=True)
    assert none is None
    assert built.r == 4
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_a_trained_adapter_continues_with_its_own_shape(model, tmp_path: Path) -> None:
    adapted, _ = load_lora(model, config(lora_target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    cfg = config(lora_model_dir=str(tmp_path / "adapter"), lora_r=32, lora_target_linear=True)
    again, built = load_lora(make_tiny_llama(tmp_path / "again"), cfg)
    assert isinstance(again, PeftModel)
    assert built.r == 4
    assert "lora_r" in [choice.key for choice in cfg.resolution]
    weights = {name: parameter for name, parameter in again.named_parameters() if "lora_" in name}
    assert all(parameter.requires_grad for parameter in weights.values())
    assert all(bool((parameter == 0.5).all()) for name, parameter in weights.items() if "lora_B" in name)


def test_a_folder_without_an_adapter_is_named(model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_config.json is missing"):
        load_lora(model, config(lora_model_dir=str(tmp_path)))


def test_quantization_state_stays_until_training() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    for _ in range(2):
        setup_quantized_meta_for_peft(layer)
    assert state.to("meta") is state
    assert state.absmax.device.type == "cpu"
    setup_quantized_peft_meta_for_training(layer)
    state.to("meta")
    assert state.absmax.device.type == "meta"
