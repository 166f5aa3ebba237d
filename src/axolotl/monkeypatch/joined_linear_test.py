from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate.utils import clean_state_dict_for_safetensors
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig

from axolotl.kernels import joined_linear, lora_ops
from axolotl.kernels.frozen_weights import lie_in_a_row
from axolotl.monkeypatch.compile_layers import compile_layers, uncompile_layers
from axolotl.monkeypatch.joined_linear import apply_joined_linear, join_projections, why_not_joined
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_model

FAST = {"backend": "aot_eager", "fullgraph": True}
IDS = torch.arange(3, 67).view(2, 32)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(folder: Path, model_type: str = "llama", **config) -> nn.Module:
    torch.manual_seed(0)
    model = make_tiny_model(folder, model_type, **config)
    model.config.use_cache = False
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(
    model: nn.Module, ids: torch.Tensor = IDS, autocast: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many layers each call of the operators computes."""
    seen: list[int] = []
    monkeypatch.setattr(
        joined_linear, "lie_in_a_row", lambda weights: seen.append(len(weights)) or lie_in_a_row(weights)
    )
    return seen


def weights_of_groups(model: nn.Module) -> list[list[torch.Tensor]]:
    attentions = [layer.self_attn for layer in model.model.layers]
    return [[attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight] for attention in attentions]


def assert_same(got: tuple[float, dict], wanted: tuple[float, dict], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=rtol)
    assert got[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=rtol, atol=atol)


@pytest.fixture
def rotations(monkeypatch) -> list[torch.Size]:
    """Of each call of the rotating operator, what it rotates."""
    seen, forward = [], lora_ops.lora_rotary_forward
    monkeypatch.setattr(lora_ops, "lora_rotary_forward", lambda yl, *rest: seen.append(yl.shape) or forward(yl, *rest))
    return seen


@pytest.mark.parametrize(
    ("model_type", "checkpointing", "rotates"),
    [
        ("llama", False, True),
        ("llama", True, True),
        ("qwen2", False, False),  # its biases are trained
        ("mistral", False, True),
        ("qwen3", False, False),  # norms in between
        ("gemma2", False, True),
    ],
)
def test_compiled_layers_compute_what_plain_ones_do(model_type, checkpointing, rotates, tmp_path, calls, rotations):
    model = make(tmp_path, model_type)
    wanted = [gradients(model, ids) for ids in (IDS, IDS[:, :20])]
    assert join_projections(model) == [None] * 2
    compile_layers(model, FAST)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for ids, plain in zip((IDS, IDS[:, :20]), wanted, strict=True):
        assert_same(gradients(model, ids), plain)
    assert not counters["graph_break"]
    # Of the layers one version for the first length and one for any other, and so of the last norm; gemma2 has two kinds of layers.
    assert counters["stats"]["unique_graphs"] <= (6 if model_type == "gemma2" else 4)
    assert set(calls) == {3}
    assert bool(rotations) == rotates


def test_all_layers_share_one_compiled_function(tmp_path, calls):
    model = make(tmp_path, num_hidden_layers=4)
    join_projections(model)
    compile_layers(model, FAST)
    calls.clear()
    for _ in range(2):
        gradients(model)
    assert counters["stats"]["unique_graphs"] == 2  # with the last norm
    assert len(calls) == 2 * 4 * 2


def test_weights_in_fp32_under_autocast(tmp_path, calls):
    model = make(tmp_path)
    wanted = gradients(model, autocast=True)
    join_projections(model)
    compile_layers(model, FAST)
    calls.clear()
    got = gradients(model, autocast=True)
    assert set(calls) == {1}, "the casts of a group are one weight"
    assert_same(got, wanted, rtol=0.05, atol=0.02)
    assert {grad.dtype for grad in got[1].values()} == {torch.float32}


def test_passes_that_are_not_compiled_compute_with_the_layers(tmp_path, calls):
    model = make(tmp_path)
    wanted, generated = gradients(model), model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False)
    join_projections(model)
    calls.clear()
    loss, got = gradients(model)
    assert loss == wanted[0] and all(torch.equal(got[name], grad) for name, grad in wanted[1].items())
    compile_layers(model, FAST)
    assert torch.equal(model.eval().generate(IDS[:, :4], max_new_tokens=3, do_sample=False), generated)
    assert not calls


def test_weights_stay_parameters_of_their_own(tmp_path):
    model = make(tmp_path)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    for _ in range(2):
        join_projections(model)
        assert all(map(lie_in_a_row, weights_of_groups(model)))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter and torch.equal(parameter, was) for name, (parameter, was) in before.items())


def break_dtype(model: nn.Module) -> nn.Module:
    return model.to(torch.bfloat16).to(torch.float32)


def break_by_loading(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model


def break_one(model: nn.Module) -> nn.Module:
    for group in weights_of_groups(model):
        group[-1].data = group[-1].data.clone()
    return model


@pytest.mark.parametrize("change", [break_dtype, break_by_loading, break_one, copy.deepcopy])
def test_weights_that_have_moved_compute_the_same(change, tmp_path, calls):
    model = break_dtype(make(tmp_path))
    wanted = gradients(model)
    join_projections(model)
    compile_layers(model, FAST)
    gradients(model)
    uncompile_layers(model)
    model = change(model)
    compile_layers(model, FAST)
    calls.clear()
    assert not any(map(lie_in_a_row, weights_of_groups(model)))
    assert_same(gradients(model), wanted)
    assert set(calls) == {3}


def hook(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: 2 * output)


def freeze(model: nn.Module) -> None:
    for group in weights_of_groups(model):
        group[0].requires_grad_(False)


def parametrize(model: nn.Module) -> None:
    for layer in model.model.layers:
        nn.utils.parametrizations.weight_norm(layer.self_attn.q_proj)


def replace_forward(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj.forward = lambda x: x.sin()


@pytest.mark.parametrize("change", [hook, freeze, parametrize, replace_forward])
def test_layers_that_changed_later_compute_by_themselves(change, tmp_path, calls):
    model = make(tmp_path)
    join_projections(model)
    change(model)
    wanted = gradients(model)
    compile_layers(model, {"backend": "aot_eager"})
    calls.clear()
    assert_same(gradients(model), wanted)
    assert not calls


def test_groups_that_cannot_be_joined_stay_where_they_are(tmp_path):
    model = make(tmp_path, num_hidden_layers=6)
    first, second, third, fourth, fifth, _ = (layer.self_attn for layer in model.model.layers)
    first.k_proj.weight = second.k_proj.weight
    third.v_proj.weight.requires_grad_(False)
    fourth.v_proj.to(torch.bfloat16)
    fifth.q_proj.__class__ = type("Other", (nn.Linear,), {})
    wanted = ["a weight has another use"] * 2 + ["a weight is not trained", "the weights are not alike"]
    before = [type(layer.self_attn) for layer in model.model.layers]
    assert join_projections(model) == [*wanted, "a projection is no plain linear layer", None]
    assert [lie_in_a_row(group) for group in weights_of_groups(model)] == [False] * 5 + [True]
    assert [type(layer.self_attn) for layer in model.model.layers][:5] == before[:5]


def test_what_is_saved_is_what_the_weights_are(tmp_path, caplog):
    model = make(tmp_path / "base", "qwen2")
    model.save_pretrained(tmp_path / "wanted", max_shard_size="50KB")
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    join_projections(model)
    state = model.state_dict()
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())
    assert all(state[name].data_ptr() == parameter.data_ptr() for name, parameter in model.named_parameters())
    assert dict(model.named_parameters()).items() <= model.state_dict(keep_vars=True).items()

    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    files = sorted(path.name for path in (tmp_path / "wanted").iterdir())
    assert len(files) > 4 and files == sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert all((tmp_path / "saved" / file).read_bytes() == (tmp_path / "wanted" / file).read_bytes() for file in files)
    torch.save(state, tmp_path / "state.pt")
    save_file(clean_state_dict_for_safetensors(state), tmp_path / "state.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).state_dict()
    for loaded in (again, torch.load(tmp_path / "state.pt"), load_file(tmp_path / "state.safetensors")):
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
    assert "shared" not in caplog.text.lower()


def test_a_checkpoint_is_loaded_into_the_shared_memory(tmp_path):
    model, other = make(tmp_path), make(tmp_path)
    nn.init.normal_(other.model.layers[0].self_attn.k_proj.weight)
    join_projections(model)
    model.load_state_dict(other.state_dict())
    assert all(map(lie_in_a_row, weights_of_groups(model)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({}, None),
        ({"torch_compile": False}, "not compiled"),
        ({"adapter": "lora"}, "adapter"),
        ({"fp8": True}, "matmuls of their own"),
        ({"load_in_8bit": True, "torch_compile": True}, "quantized"),
        ({"unfrozen_parameters": ["lm_head"]}, "unfrozen_parameters"),
        ({"fsdp_config": {"reshard_after_forward": True}, "torch_compile": True}, "fsdp_config"),
        ({"tensor_parallel_size": 1, "dp_replicate_size": 2}, None),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"optimizer": "q_galore_adamw8bit"}, "other memory"),
    ],
)
def test_runs_whose_projections_are_joined(keys, reason):
    found = why_not_joined(DictDefault(keys), LlamaConfig(), has_gpu=True)
    assert found is None if reason is None else reason in found


def test_compiled_training_on_a_cpu_is_joined(tmp_path):
    for cfg, is_joined in (
        ({"torch_compile": True}, True),
        ({}, False),
        ({"torch_compile": True, "adapter": "lora"}, False),
    ):
        model = make(tmp_path)
        apply_joined_linear(DictDefault(cfg), model)
        assert all(lie_in_a_row(group) is is_joined for group in weights_of_groups(model))
