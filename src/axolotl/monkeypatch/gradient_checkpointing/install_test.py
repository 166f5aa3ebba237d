from __future__ import annotations

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl.exceptions import ConfigError, ModelError
from axolotl.monkeypatch.gradient_checkpointing import install
from axolotl.monkeypatch.gradient_checkpointing.install import apply_activation_policies, remove_activation_policies
from axolotl.monkeypatch.gradient_checkpointing.offload_cpu import HostStore
from axolotl.monkeypatch.gradient_checkpointing.offload_disk import Disco
from axolotl.monkeypatch.gradient_checkpointing.selective import Selection

NUM_LAYERS = 3
MODES = [True, "legacy", "disk", "hidden_states"]
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.arange(2 * 25).reshape(2, 25) * 7 % 64


def make_model(adapter: bool = False, **config) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**{**SMALL, **config}))
    if adapter:
        model = get_peft_model(
            model, LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False)
        )
    return model.train()


def step(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, with the same dropout masks every time."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def switch_on(model: nn.Module, **kwargs) -> None:
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": kwargs})


def assert_same(one, other) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert torch.equal(grad, other[1][name]), name


class CountingStore(HostStore):
    """Remembers what was put, without keeping it alive."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.alive: list[weakref.ref] = []

    def put(self, tensor):
        parked = super().put(tensor)
        self.shapes.append(tuple(tensor.shape))
        self.alive.append(weakref.ref(parked))
        return parked


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("mode", [None, *MODES])
def test_loss_and_gradients_are_those_of_the_plain_run(mode, reentrant, adapter):
    model = make_model(adapter, attention_dropout=0.1)
    expected = step(model)
    apply_activation_policies(model, offloading=mode)
    switch_on(model, use_reentrant=reentrant)
    assert_same(step(model), expected)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    model.train()
    assert_same(step(model), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("mode", MODES)
def test_each_layer_leaves_its_input_and_nothing_stays_behind(monkeypatch, mode, reentrant):
    store = CountingStore()
    monkeypatch.setitem(install.STORES, mode, lambda: store)
    model = make_model()
    apply_activation_policies(model, offloading=mode)
    switch_on(model, use_reentrant=reentrant)
    step(model)
    hidden = (2, 25, 32)
    # With True, the final norm and what else the decoder keeps goes too.
    assert store.shapes.count(hidden) >= NUM_LAYERS if mode is True else store.shapes == [hidden] * NUM_LAYERS
    gc.collect()
    assert [reference for reference in store.alive if reference() is not None] == []


def test_without_checkpointing_all_activations_leave_once_and_weights_stay(monkeypatch):
    store = CountingStore()
    monkeypatch.setitem(install.STORES, True, lambda: store)
    model = make_model()
    expected = step(model)
    apply_activation_policies(model, offloading=True)
    assert_same(step(model), expected)
    weights = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    assert not weights & set(store.shapes)
    # The inputs of q, k and v, of gate and up, are one tensor each.
    assert store.shapes.count((2, 25, 48)) <= 3 * NUM_LAYERS


def test_several_forwards_before_their_backwards():
    model = make_model()
    expected = step(model)[1]
    apply_activation_policies(model, offloading="disk")
    switch_on(model, use_reentrant=False)
    model.zero_grad()
    losses = [model(input_ids=IDS, labels=IDS, use_cache=False).loss for _ in range(2)]
    (losses[0] + losses[1]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * expected[name])


def test_the_file_on_disk_does_not_grow_from_step_to_step():
    model = make_model()
    apply_activation_policies(model, offloading="disk")
    switch_on(model, use_reentrant=False)
    step(model)
    size = Disco.get_instance().num_bytes
    for _ in range(3):
        step(model)
    assert Disco.get_instance().num_bytes == size > 0


def test_policies_are_replaced_and_removed():
    model = make_model()
    apply_activation_policies(model, offloading=True)
    apply_activation_policies(model, offloading="hidden_states")
    assert not model.base_model._forward_hooks
    remove_activation_policies(model)
    assert "_set_gradient_checkpointing" not in vars(model)
    switch_on(model, use_reentrant=False)
    assert model.model.layers[0]._gradient_checkpointing_func.func is torch.utils.checkpoint.checkpoint


def test_a_model_with_checkpointing_of_its_own_is_refused():
    with pytest.raises(ModelError, match="checkpointing of its own"):
        apply_activation_policies(nn.Linear(2, 2), offloading=True)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("save", [("attention", "all_matmuls"), ("mm", "aten.silu")])
def test_selection_keeps_loss_and_gradients(save, offload):
    model = make_model(attention_dropout=0.0)
    expected = step(model)
    apply_activation_policies(model, selection=Selection(save=save, offload=offload))
    switch_on(model, use_reentrant=False)
    assert_same(step(model), expected)
    apply_activation_policies(model, offloading="hidden_states", selection=Selection(save=save, offload=offload))
    switch_on(model, use_reentrant=False)
    assert_same(step(model), expected)


class CountAttention(TorchDispatchMode):
    """Counts the attention operations that really run: kept results never get to a mode outside of the checkpoint's."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "scaled_dot_product" in func.name() and "backward" not in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("selection", "runs"),
    [
        (None, 2 * NUM_LAYERS),
        (Selection(), NUM_LAYERS + 1),
        (Selection(offload=True), NUM_LAYERS + 1),
        (Selection(save=("mm",)), 2 * NUM_LAYERS),
        (Selection(recompute_layer_types=("full_attention",)), 2 * NUM_LAYERS),
        (Selection(recompute_layer_types=("sliding_attention",), save_sliding_window=True), NUM_LAYERS + 1),
        (Selection(save_sliding_window=True), NUM_LAYERS),
    ],
)
def test_kept_attention_is_not_computed_again(selection, runs):
    model = make_model()
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    apply_activation_policies(model, selection=selection)
    switch_on(model, use_reentrant=False)
    with CountAttention() as attention:
        step(model)
    assert attention.count == runs


def test_a_selection_that_keeps_nothing_says_so(caplog):
    from axolotl.monkeypatch.gradient_checkpointing.selective import LOG

    LOG.logger.propagate = True
    model = make_model(attn_implementation="eager")
    apply_activation_policies(model, selection=Selection())
    switch_on(model, use_reentrant=False)
    with caplog.at_level("WARNING"):
        step(model), step(model)
    assert "keeps nothing" in caplog.text


def test_unknown_operators_are_refused():
    with pytest.raises(ConfigError, match=r"save: \[aten\.nonsense\]"):
        Selection(save=("aten.nonsense",)).keeps(None)
