from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from transformers import LlamaConfig

from axolotl.kernels import lora_ops
from axolotl.monkeypatch.attention.documents import add_document_hook, register_masks
from axolotl.monkeypatch.compile_layers import (
    COMPILED_BY_DEFAULT,
    compile_layers,
    uncompile_layers,
    why_not_by_default,
)
from axolotl.monkeypatch.gradient_checkpointing.install import apply_activation_policies
from axolotl.monkeypatch.gradient_checkpointing.offload_cpu import HostStore
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_model

KERNELS = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}
# It traces, differentiates and partitions like the real compiler, and generates no code.
FAST = {"backend": "aot_eager"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(model_type: str, folder: Path, *, lora: bool) -> torch.nn.Module:
    register_masks()  # Masks tell the borders: the varlen kernel runs on CUDA only (tests/gpu).
    torch.manual_seed(0)
    model = make_tiny_model(folder, model_type)
    model.config.use_cache = False
    add_document_hook(model, varlen=False)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        apply_lora_kernel_patches(model, DictDefault(KERNELS))
    return model.train()


def packed(vocab: int, *lengths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(3, vocab, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("model_type", sorted(COMPILED_BY_DEFAULT))
def test_compiled_layers_compute_what_plain_ones_do(model_type, lora, tmp_path):
    model = make(model_type, tmp_path, lora=lora)
    vocab = model.config.vocab_size
    batches = [packed(vocab, *lengths) for lengths in ((20, 12), (9, 9, 14), (30, 2), (1, 5, 20, 7))]
    plain = [gradients(model, batch) for batch in batches]
    compile_layers(model, FAST)
    compiled = [gradients(model, batch) for batch in batches]
    assert not counters["graph_break"]
    for (loss, grads), (wanted, wanted_grads) in zip(compiled, plain, strict=True):
        assert loss == pytest.approx(wanted, abs=1e-5)
        assert grads.keys() == wanted_grads.keys()
        assert all(wanted_grads[name].abs().max() > 0 for name in grads if "lora" in name)
        for name in grads:
            torch.testing.assert_close(grads[name], wanted_grads[name], rtol=1e-4, atol=1e-6)
    # Of the layers and of the last norm one version for the first length and one for any other; the first layer takes no gradient
    # of its input under an adapter.
    assert counters["stats"]["unique_graphs"] <= (6 if lora else 4)


@pytest.fixture
def rotations(monkeypatch) -> list[int]:
    """One entry for every call of the operator that rotates queries and keys."""
    calls, forward = [], lora_ops.lora_rotary_forward
    monkeypatch.setattr(lora_ops, "lora_rotary_forward", lambda *args: calls.append(1) or forward(*args))
    return calls


def test_rows_of_one_length_compile_once(tmp_path, rotations):
    model = make("llama", tmp_path, lora=True)
    compile_layers(model, FAST)
    for seed in range(4):
        torch.manual_seed(seed)
        ids = torch.randint(3, model.config.vocab_size, (2, 16))
        gradients(model, {"input_ids": ids, "labels": ids})
    # The first layer, which takes no gradient of its input, the others, and the last norm.
    assert counters["stats"]["unique_graphs"] == 3
    assert len(rotations) == 4 * len(model.base_model.model.model.layers)


def test_evaluation_and_generation_are_not_compiled(tmp_path):
    model = make("llama", tmp_path, lora=False)
    compile_layers(model, FAST)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]))
    model.generate(input_ids=torch.tensor([[3, 4, 5]]), max_new_tokens=3)
    assert counters["stats"]["unique_graphs"] == 0


def test_checkpointing_keeps_its_gradients_and_skips_the_last_matmul(tmp_path, monkeypatch, rotations):
    calls, formed = [], []
    forward, backward = lora_ops.lora_gated_forward, lora_ops.lora_gated_backward

    def spy(*args, write_h=False):
        formed.append(write_h)
        return backward(*args, write_h=write_h)

    monkeypatch.setattr(lora_ops, "lora_gated_forward", lambda *args: calls.append(1) or forward(*args))
    monkeypatch.setattr(lora_ops, "lora_gated_backward", spy)
    model = make("llama", tmp_path, lora=True)
    batch = packed(model.config.vocab_size, 20, 12)
    layers = len(model.base_model.model.model.layers)
    wanted_loss, wanted = gradients(model, batch)
    compile_layers(model, FAST)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls.clear()
        formed.clear()
        rotations.clear()
        loss, grads = gradients(model, batch)
        assert counters["stats"]["unique_graphs"] > 0
        assert not counters["graph_break"]
        assert loss == pytest.approx(wanted_loss, abs=1e-5)
        assert len(calls) == layers  # once per layer, not again in backward
        assert len(rotations) == (
            2 * layers if checkpointing else layers
        )  # attention's backward needs queries and keys
        assert formed == [checkpointing] * layers  # what forward had from h is formed again only where it was not kept
        for name, grad in wanted.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("offloading", [True, "hidden_states"])
def test_inputs_of_checkpointed_layers_go_to_the_store(tmp_path, monkeypatch, offloading):
    sent, calls = [], []
    put, activation = HostStore.put, lora_ops.lora_gated_forward
    monkeypatch.setattr(lora_ops, "lora_gated_forward", lambda *args: calls.append(1) or activation(*args))
    monkeypatch.setattr(HostStore, "put", lambda self, tensor: sent.append(tensor.shape) or put(self, tensor))
    model = make("llama", tmp_path, lora=True)
    batch = packed(model.config.vocab_size, 20, 12)
    wanted_loss, wanted = gradients(model, batch)
    apply_activation_policies(model, offloading=offloading)
    compile_layers(model, FAST)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls.clear()
    loss, grads = gradients(model, batch)
    assert counters["stats"]["unique_graphs"] > 0
    layers, hidden = len(model.base_model.model.model.layers), (1, 32, model.config.hidden_size)
    assert len(calls) == layers  # once per layer, not again in backward
    assert layers <= sent.count(hidden) <= layers + 1  # what the last norm keeps, where the whole decoder is asked for
    assert set(sent) <= {hidden, (1, 32, model.config.head_dim)}  # tables of positions are small beside real layers
    assert loss == pytest.approx(wanted_loss, abs=1e-5)
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_compiled_runs_plain_when_nobody_asked(tmp_path):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    model = make("llama", tmp_path, lora=False)
    batch = packed(model.config.vocab_size, 5, 6)
    wanted, _ = gradients(model, batch)
    compile_layers(model, {"backend": broken}, may_fall_back=True)
    assert gradients(model, batch)[0] == pytest.approx(wanted)
    uncompile_layers(model)
    compile_layers(model, {"backend": broken})
    with pytest.raises(Exception, match="no compiler here"):
        gradients(model, batch)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({}, None),
        ({"max_steps": 5}, "fewer than 20 steps"),
        ({"load_in_8bit": True}, "cannot be traced"),
        ({"adapter": "qlora", "load_in_4bit": True, **KERNELS}, None),
        ({"adapter": "qlora", "load_in_4bit": True, **KERNELS, "lora_dropout": 0.1}, "below the LoRA kernels"),
        ({"adapter": "llama-adapter"}, "not tested with"),
        ({"activation_offloading": True}, None),
        ({"activation_offloading": "disk"}, "not tested with"),
    ],
)
def test_what_is_compiled_when_nothing_is_said(keys, reason):
    found = why_not_by_default(DictDefault(keys), LlamaConfig(), has_gpu=True)
    assert found is None if reason is None else reason in found
