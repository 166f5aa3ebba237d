from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from axolotl.exceptions import ConfigError
from axolotl.kernels.fp8_linear import RECIPES, Fp8TrainingLinear
from axolotl.monkeypatch.compile_layers import compile_layers
from axolotl.monkeypatch.fp8_linear import apply_fp8_training
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_model

IDS = torch.arange(3, 67).view(2, 32)


def make(folder: Path, model_type: str = "llama", **config) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, **config}
    model = make_tiny_model(folder, model_type, **sizes)
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3)  # large random weights make of a small change another distribution of attention
    return model.train()


def gradients(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def far(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == wanted.keys()
    difference = sum((ours[name] - grad).square().sum() for name, grad in wanted.items())
    return float((difference / sum(grad.square().sum() for grad in wanted.values())).sqrt())


def converted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Fp8TrainingLinear)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_gradients_are_close_to_those_of_dense_layers(model_type, recipe, tmp_path):
    model = make(tmp_path, model_type)
    wanted_loss, wanted = gradients(model)
    cfg = DictDefault(fp8_config={"recipe": recipe})
    apply_fp8_training(model, cfg)
    assert len(converted(model)) == 7 * len(model.model.layers)
    loss, got = gradients(model)
    assert loss != wanted_loss and loss == pytest.approx(wanted_loss, rel=0.01)
    # Two or three bits behind the point, in two layers: a wrong scale or factor is off by far more.
    assert far(got, wanted) < 0.2
    (choice,) = cfg.resolution
    assert choice["key"] == "fp8" and choice["value"] == f"14 linear layers, {recipe}"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_what_plain_ones_do(recipe, checkpointing, tmp_path):
    model = make(tmp_path)
    apply_fp8_training(model, DictDefault(fp8_config={"recipe": recipe}))
    wanted_loss, wanted = gradients(model)
    torch._dynamo.reset()
    counters.clear()
    compile_layers(model, {"backend": "aot_eager", "fullgraph": True})
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, got = gradients(model)
    assert loss == pytest.approx(wanted_loss, rel=1e-3) and far(got, wanted) < 0.02
    assert not counters["graph_break"]


def test_what_is_saved_and_evaluated_is_what_the_weights_are(tmp_path):
    model = make(tmp_path / "base")
    names = list(model.state_dict())
    wanted = model.eval()(input_ids=IDS, labels=IDS).loss
    apply_fp8_training(model, DictDefault())
    assert list(model.state_dict()) == names
    assert model(input_ids=IDS, labels=IDS).loss == wanted
    model.generate(input_ids=IDS[:1, :4], max_new_tokens=2)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_resumed_run_goes_on_to_the_last_bit(tmp_path):
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        gradients(model)
        optimizer.step()

    model = make(tmp_path)
    apply_fp8_training(model, DictDefault())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    step(model, optimizer)

    other = make(tmp_path)
    other.load_state_dict(saved[0])
    apply_fp8_training(other, DictDefault())
    resumed = torch.optim.AdamW(other.parameters(), lr=1e-3)
    resumed.load_state_dict(saved[1])
    step(other, resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_layers_that_cannot_and_those_that_are_named_stay_as_they_are(tmp_path):
    model = make(tmp_path, intermediate_size=100)
    cfg = DictDefault(fp8_config={"filter_fqns": ["o_proj", "layers.1.self_attn.q"]})
    apply_fp8_training(model, cfg)
    attention = [f"model.layers.{n}.self_attn.{name}_proj" for n in (0, 1) for name in "qkv"]
    assert converted(model) == [name for name in attention if name != "model.layers.1.self_attn.q_proj"]
    (choice,) = cfg.resolution
    assert "6 are left alone (a size that is no multiple of 16)" in choice["reason"]
    assert "3 are left alone (named in `filter_fqns`)" in choice["reason"]
    again = DictDefault(fp8_config={"recipe": "rowwise", "filter_fqns": ["o_proj", "layers.1.self_attn.q"]})
    apply_fp8_training(model, again)
    assert again.resolution[0]["value"] == "5 linear layers, rowwise"
    gradients(model)


def test_routers_stay_as_they_are(tmp_path):
    model = make(tmp_path)
    model.model.layers[0].mlp.gate = nn.Linear(64, 16)
    cfg = DictDefault()
    apply_fp8_training(model, cfg)
    assert "model.layers.0.mlp.gate" not in converted(model)
    assert "1 is left alone (a router)" in cfg.resolution[0]["reason"]


def test_a_model_without_such_layers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none of this model can: 14 are left alone \(a size"):
        apply_fp8_training(make(tmp_path, hidden_size=40), DictDefault())


def test_a_filter_that_names_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"filter_fqns: \[donw_proj\].*`model.layers.0.self_attn.q_proj`"):
        apply_fp8_training(make(tmp_path), DictDefault(fp8_config={"filter_fqns": ["donw_proj"]}))
