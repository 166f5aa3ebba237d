"""Ratios of matrices whose noise is known, and which layers of a model train."""

from __future__ import annotations

import json

import pytest
import torch

from axolotl.exceptions import ConfigError
from axolotl.integrations.spectrum.plugin import SpectrumPlugin
from axolotl.integrations.spectrum.ratios import (
    choose_layers,
    find_matrices,
    measure,
    patterns_for,
    read_ratios,
    signal_to_noise,
    singular_values,
)
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_model


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
def test_singular_values_are_those_of_the_decomposition(shape):
    matrix = noise(*shape)
    wanted = torch.linalg.svdvals(matrix.double()).sort().values
    torch.testing.assert_close(singular_values(matrix).sort().values, wanted, rtol=1e-6, atol=1e-6)


def test_the_ratio_is_the_one_of_the_formula():
    matrix = noise(30, 50) + 3 * noise(30, 2, seed=1) @ noise(2, 50, seed=2)
    values = torch.linalg.svdvals(matrix.double())
    upper, lower = torch.quantile(values, 0.75), torch.quantile(values, 0.25)
    threshold = (upper - lower) / 1.349 * (1 + (30 / 50) ** 0.5)
    wanted = values[values > threshold].sum() / values[values <= threshold].sum() / values[0]
    assert signal_to_noise(matrix) == pytest.approx(float(wanted), rel=1e-5)
    assert signal_to_noise(torch.stack([matrix, matrix]).bfloat16()) == pytest.approx(float(wanted), rel=0.05)


def test_layers_are_chosen_within_their_kind():
    ratios = {f"model.layers.{i}.{kind}": ratio for kind, up in (("mlp.up_proj", 1), ("self_attn.q_proj", -1))
              for i, ratio in enumerate(float(up * n) for n in range(4))}  # fmt: skip
    assert choose_layers(ratios, 0.5) == [
        "model.layers.2.mlp.up_proj",
        "model.layers.3.mlp.up_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert len(choose_layers(ratios, 0.1)) == 2
    assert choose_layers(ratios, 1.0) == list(ratios)


@pytest.mark.parametrize("tied", [False, True])
def test_what_trains(tmp_path, tied):
    model = make_tiny_model(tmp_path, "qwen2", num_hidden_layers=4, tie_word_embeddings=tied)
    model.config.use_cache = False
    cfg = DictDefault(
        {"base_model": str(tmp_path), "spectrum_top_fraction": 0.5, "unfrozen_parameters": ["model.norm"]}
    )
    SpectrumPlugin().pre_lora_load(cfg, model)
    chosen = choose_layers(measure(find_matrices(model)), 0.5)
    assert len(chosen) == 14
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    biases = {f"{name}.bias" for name in chosen if f"{name}.bias" in dict(model.named_parameters())}
    ends = {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    assert trained == {f"{name}.weight" for name in chosen} | biases | ends
    assert cfg.resolution[0]["reason"].startswith("14 of 28")


def test_experts_in_one_parameter_count_as_a_matrix(tmp_path):
    model = make_tiny_model(tmp_path, "MixtralConfig", num_local_experts=2)
    names = [name for name in find_matrices(model) if "experts" in name]
    assert names
    assert any(pattern.startswith("^" + names[0]) for pattern in patterns_for(names, model))


def test_a_model_that_answers_is_left_alone(tmp_path):
    model = make_tiny_model(tmp_path)
    assert model.config.use_cache
    SpectrumPlugin().pre_lora_load(DictDefault(), model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_contradicts_it(tmp_path):
    model = make_tiny_model(tmp_path)
    model.config.use_cache = False
    with pytest.raises(ConfigError, match="adapter: lora"):
        SpectrumPlugin().pre_lora_load(DictDefault({"adapter": "lora"}), model)


def test_ratios_from_a_file(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    model.config.use_cache = False
    names = list(find_matrices(model))
    path = tmp_path / "snr.json"
    path.write_text(json.dumps({name: {"snr": float(len(names) - i), "type": "x"} for i, name in enumerate(names)}))
    assert read_ratios(path)[names[0]] == len(names)
    SpectrumPlugin().pre_lora_load(DictDefault({"spectrum_model_name": str(path)}), model)
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert not model.model.layers[1].mlp.up_proj.weight.requires_grad
    path.write_text(json.dumps({"other": 1.0}))
    with pytest.raises(ConfigError, match="another model"):
        SpectrumPlugin().pre_lora_load(DictDefault({"spectrum_model_name": str(path)}), model)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="not a file of ratios"):
        SpectrumPlugin().pre_lora_load(DictDefault({"spectrum_model_name": str(path)}), model)
