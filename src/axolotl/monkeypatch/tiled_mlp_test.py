from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from axolotl.exceptions import ConfigError
from axolotl.monkeypatch.tiled_mlp import apply_tiled_mlp, num_shards_for, remove_tiled_mlp, tiled_forward
from tests.tiny import make_tiny_model

IDS = torch.arange(2 * 37).reshape(2, 37) * 7 % 384


def step(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_tiles_change_nothing(tmp_path, architecture, adapter):
    model = make_tiny_model(tmp_path, architecture)
    if adapter:
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True)
        model = get_peft_model(model, lora)
    model.train()
    loss, grads = step(model)
    for num_shards in (None, 4):
        assert apply_tiled_mlp(model, num_shards) == 2
        tiled_loss, tiled = step(model)
        torch.testing.assert_close(tiled_loss, loss, rtol=1e-6, atol=1e-6)
        assert tiled.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(tiled[name], grad, rtol=1e-5, atol=1e-6)
    remove_tiled_mlp(model)
    assert torch.equal(step(model)[0], loss)


def test_no_more_than_one_tile_is_wide_at_a_time():
    widest = []
    mlp = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    mlp[1].register_forward_hook(lambda module, args, output: widest.append(output.shape[-2]))
    x = torch.randn(2, 30, 8, requires_grad=True)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.shape) or t, lambda t: t):
        out = tiled_forward(mlp, 7)(x)
    assert max(widest) == 5 and sum(widest) == 30
    assert not any(shape[-1] == 64 and len(shape) == 3 for shape in held), "only the inputs of the tiles are kept"
    out.sum().backward()
    assert sum(widest) == 60, "each tile is computed again once"


def test_without_gradients_nothing_is_kept():
    mlp = nn.Linear(8, 8)
    x = torch.randn(3, 10, 8)
    with torch.no_grad():
        torch.testing.assert_close(tiled_forward(mlp, 4)(x), mlp(x))


def test_number_of_tiles_follows_the_sequence():
    assert [num_shards_for(tokens, 4096) for tokens in (1, 4096, 4097, 131072)] == [1, 1, 2, 32]


def test_experts_are_refused(tmp_path):
    model = make_tiny_model(tmp_path, "MixtralConfig", num_local_experts=4)
    with pytest.raises(ConfigError, match="no dense MLP"):
        apply_tiled_mlp(model)
