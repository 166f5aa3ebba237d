"""Every knob that saves memory, on a GPU: gradients of the plain run, a lower peak, precisions through the command line."""

from __future__ import annotations

import gc
import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from axolotl.monkeypatch.gradient_checkpointing import CPU_Offloaded_Gradient_Checkpointer, Disco
from axolotl.monkeypatch.gradient_checkpointing.install import apply_activation_policies
from axolotl.monkeypatch.gradient_checkpointing.offload_cpu import HostStore
from axolotl.monkeypatch.gradient_checkpointing.selective import Selection
from axolotl.monkeypatch.layer_offloading import offload_layers
from axolotl.monkeypatch.tiled_mlp import apply_tiled_mlp
from axolotl.utils.callbacks.loss_scale import SCALE, SKIPPED, LossScaleCallback
from tests.integration.training_runs import make_trainer
from tests.tiny import make_tiny_base

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

NUM_LAYERS, HIDDEN, TOKENS = 8, 512, 4096
MODES = [True, "legacy", "disk", "hidden_states"]
MIB = 2**20
INPUT_BYTES = TOKENS * HIDDEN * 2  # of one layer in bf16


@pytest.fixture(autouse=True)
def same_sums_every_time():
    """The backward pass of flash attention adds up in any order unless it is told not to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_model(adapter: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=2048, num_hidden_layers=NUM_LAYERS, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=TOKENS, attn_implementation="sdpa",
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear"))
    return model.train()


def switch_on(model: nn.Module, **kwargs) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    getattr(base, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": kwargs})


def run_step(model: nn.Module) -> float:
    """Forward and backward. Gradients that are there are set to 0, so that they are part of no peak."""
    ids = torch.arange(TOKENS, device="cuda").reshape(1, -1) * 7 % 256
    torch.manual_seed(1)
    model.zero_grad(set_to_none=False)
    hidden = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    # Without the head, whose logits would hide what the layers keep. The mean square of a normed output has no gradient.
    out = hidden(input_ids=ids, use_cache=False).last_hidden_state.float()
    loss = (out * torch.linspace(-1.0, 1.0, out.shape[-1], device=out.device)).mean()
    loss.backward()
    return loss.item()


def step(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    return run_step(model), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def peak(model: nn.Module) -> int:
    """Bytes that a step takes beyond what is there before it."""
    run_step(model)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_step(model)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def assert_same(one, other) -> None:
    # The backward passes of attention and embeddings on CUDA add in another order each time. A tensor that came back too late, or
    # from the wrong place, is off by its whole size.
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert (grad - other[1][name]).float().norm() <= 0.03 * other[1][name].float().norm(), name


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("mode", MODES)
def test_offloading_keeps_gradients_and_lowers_the_peak(mode, adapter, reentrant):
    model = make_model(adapter)
    switch_on(model, use_reentrant=reentrant)
    expected, checkpointed = step(model), peak(model)
    apply_activation_policies(model, offloading=mode)
    switch_on(model, use_reentrant=reentrant)
    for _ in range(3):
        assert_same(step(model), expected)
    # All inputs but those of the few layers that are on their way are gone. The disk gets two more in flight.
    assert checkpointed - peak(model) > (NUM_LAYERS - 5) * INPUT_BYTES
    gc.collect()
    assert not Disco.get_instance()._kept


def test_copies_wait_for_the_computation_and_it_for_them():
    """A long computation writes each tensor just before it leaves, and reads it as soon as it is back."""
    store, weight = HostStore(), torch.randn(4096, 4096, device="cuda")
    kept, sums = [], []
    for number in range(12):
        tensor = torch.full((1024, 4096), float(number), device="cuda")
        for _ in range(5):
            tensor = (tensor @ weight) * 0 + number
        sums.append(number)
        kept.append(store.put(tensor))
        tensor = None
        torch.empty(1024, 4096, device="cuda").fill_(-1.0)  # takes memory that was given back too early
    while kept:
        back = store.take(kept.pop())
        assert torch.equal(back, torch.full_like(back, float(sums.pop())))


def test_memory_does_not_grow_from_step_to_step():
    model = make_model()
    apply_activation_policies(model, offloading=True)
    switch_on(model, use_reentrant=False)
    run_step(model)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        run_step(model)
    assert torch.cuda.memory_allocated() - before < 3 * INPUT_BYTES


@pytest.mark.parametrize("checkpoint", [CPU_Offloaded_Gradient_Checkpointer, Disco])
def test_documented_checkpoints(checkpoint):
    torch.manual_seed(0)
    layers = nn.ModuleList(
        nn.Sequential(nn.Linear(256, 1024), nn.Dropout(0.1), nn.GELU(), nn.Linear(1024, 256)) for _ in range(6)
    ).cuda()
    x = torch.randn(512, 256, device="cuda", requires_grad=True)

    def run(call):
        torch.manual_seed(1)
        layers.zero_grad()
        hidden = x
        with torch.autocast("cuda", torch.bfloat16):
            for layer in layers:
                hidden = call(layer, hidden)
        hidden.float().square().mean().backward()
        return [p.grad.clone() for p in layers.parameters()]

    expected = run(lambda layer, hidden: layer(hidden))
    for got, grad in zip(run(checkpoint.apply), expected, strict=True):
        assert torch.equal(got, grad)


@pytest.mark.parametrize("offload", [False, True])
def test_kept_attention(offload):
    model = make_model()
    plain = peak(model)
    expected = step(model)
    apply_activation_policies(model, selection=Selection(offload=offload), offloading="hidden_states")
    switch_on(model, use_reentrant=False)
    assert_same(step(model), expected)
    assert peak(model) < plain


def test_attention_that_waits_on_the_host_takes_no_memory():
    peaks = []
    for offload in (False, True):
        model = make_model()
        apply_activation_policies(model, selection=Selection(offload=offload))
        switch_on(model, use_reentrant=False)
        peaks.append(peak(model))
    assert peaks[0] - peaks[1] > (NUM_LAYERS - 5) * INPUT_BYTES


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["none", "plain", "reentrant"])
def test_layers_come_when_they_are_needed(reentrant):
    model = make_model(adapter=True)
    if reentrant is not None:
        switch_on(model, use_reentrant=reentrant)
    expected = step(model)
    weights = sum(
        p.nbytes for layer in model.get_base_model().model.layers for p in layer.parameters() if not p.requires_grad
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    offload_layers(model, torch.device("cuda:0"))
    gc.collect()
    assert before - torch.cuda.memory_allocated() > 0.9 * weights
    for _ in range(3):
        assert_same(step(model), expected)
    gc.collect()
    assert before - torch.cuda.memory_allocated() > 0.6 * weights


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bit_layers_move_too(tmp_path):
    make_tiny_base(tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=four_bits, device_map={"": 0}, dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)).train()
    switch_on(model, use_reentrant=False)
    expected = step(model)
    assert offload_layers(model, torch.device("cuda:0")).num_bytes > 0
    assert_same(step(model), expected)


def test_tiles_lower_the_peak():
    model = make_model()
    expected, plain = step(model), peak(model)
    apply_tiled_mlp(model, 8)
    loss, grads = step(model)
    assert loss == pytest.approx(expected[0], rel=1e-2)
    for name, grad in expected[1].items():
        torch.testing.assert_close(grads[name], grad, rtol=0.1, atol=0.02 * grad.abs().max().item())
    assert peak(model) < 0.7 * plain


@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
def test_fp16_scales_the_loss_and_resumes_with_the_scale(tmp_path, lora):
    def run(folder, steps: int, resume: str | None = None):
        trainer = make_trainer(
            tmp_path / folder, lora=lora, use_cpu=False, fp16=True, max_steps=steps, save_strategy="steps", save_steps=3,
            lr_scheduler_type="constant", per_device_train_batch_size=4,
        )  # fmt: skip
        trainer.add_callback(LossScaleCallback(trainer))
        trainer.train(resume_from_checkpoint=resume)
        logs = [entry for entry in trainer.state.log_history if SCALE in entry]
        return trainer, [(entry["loss"], entry[SCALE], entry[SKIPPED]) for entry in logs]

    trainer, whole = run("whole", 6)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    assert len(whole) == 6 and whole[0][1] >= 1
    run("parts", 3)
    checkpoint = tmp_path / "parts" / "out" / "checkpoint-3"
    assert (checkpoint / "scaler.pt").is_file()
    assert run("parts", 6, str(checkpoint))[1] == whole


def test_bf16_computes_on_float32_weights(tmp_path):
    trainer = make_trainer(tmp_path, use_cpu=False, bf16=True, max_steps=3, per_device_train_batch_size=4)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
