from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from axolotl.exceptions import ConfigError
from axolotl.monkeypatch import layer_offloading
from axolotl.monkeypatch.gradient_checkpointing import apply_activation_policies
from axolotl.monkeypatch.layer_offloading import offload_layers
from tests.tiny import make_tiny_model

CPU = torch.device("cpu")
IDS = torch.arange(2 * 25).reshape(2, 25) * 7 % 64


def make_model(adapter: bool = True):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    )
    if adapter:
        model = get_peft_model(
            model, LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False)
        )
    return model.train()


def step(model):
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def switch_on(model, **kwargs):
    base = model.get_base_model()
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    getattr(base, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": kwargs})


@pytest.fixture
def poisoned(monkeypatch):
    """Weights in host memory are not a number: what is computed with one that has not been brought shows it."""
    honest = layer_offloading.LayerOffloader._evict

    def evict(self, layer):
        honest(self, layer)
        for weight in layer.weights:
            weight.parameter.data = torch.full_like(weight.host, float("nan"))

    monkeypatch.setattr(layer_offloading.LayerOffloader, "_evict", evict)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["none", "plain", "reentrant"])
def test_loss_and_gradients_are_those_of_the_plain_run(poisoned, reentrant):
    model = make_model()
    loss, grads = step(model)
    if reentrant is not None:
        switch_on(model, use_reentrant=reentrant)
    offloader = offload_layers(model, CPU)
    assert offloader.num_here == 0
    for _ in range(2):
        got, got_grads = step(model)
        assert torch.equal(got, loss)
        assert got_grads.keys() == grads.keys()
        assert all(torch.equal(got_grads[name], grad) for name, grad in grads.items())
        assert offloader.num_here <= 1
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=IDS).logits).all()
    assert offloader.num_here == 0
    offloader.remove()
    model.train()
    assert torch.equal(step(model)[0], loss)


def test_no_more_than_two_layers_are_here_at_once(monkeypatch):
    model = make_model()
    switch_on(model, use_reentrant=False)
    offload_layers(model, CPU)
    most = []
    honest = layer_offloading.LayerOffloader._bring

    def bring(self, layer):
        honest(self, layer)
        most.append(self.num_here)

    monkeypatch.setattr(layer_offloading.LayerOffloader, "_bring", bring)
    step(model)
    assert max(most) == 2  # one that runs, and in the backward pass the one before it until this one is needed


def test_trained_weights_stay_and_are_updated():
    model = make_model()
    offload_layers(model, CPU)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    step(model)
    torch.optim.SGD(trained, lr=0.1).step()
    assert all(not torch.equal(one, other) for one, other in zip(trained, before, strict=True))


def test_saved_weights_are_whole():
    model = make_model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    offload_layers(model, CPU)
    step(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])


def test_a_model_that_trains_all_weights_is_refused():
    with pytest.raises(ConfigError, match="all weights of the layers are trained"):
        offload_layers(make_model(adapter=False), CPU)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bit_weights_move_and_their_scales_stay(tmp_path):
    make_tiny_model(tmp_path, vocab_size=64, hidden_size=64, intermediate_size=128)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits, device_map={"": "cpu"})
    for module in base.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), lora).train()
    loss, grads = step(model)
    switch_on(model, use_reentrant=False)
    apply_activation_policies(model, offloading="disk")
    switch_on(model, use_reentrant=False)
    packed = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    offloader = offload_layers(model, CPU)
    assert packed > 0 and offloader.num_bytes >= packed
    got, got_grads = step(model)
    assert torch.equal(got, loss)
    assert all(torch.equal(got_grads[name], grad) for name, grad in grads.items())
