from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from axolotl.exceptions import ConfigError
from axolotl.kernels.fp8 import Fp8Linear
from axolotl.monkeypatch.compile_layers import compile_layers
from axolotl.monkeypatch.fp8_base import apply_fp8_base
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_model

KERNELS = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}
IDS = torch.arange(3, 35).view(2, 16)


def make(folder, model_type: str, targets) -> nn.Module:
    torch.manual_seed(0)
    model = make_tiny_model(folder, model_type, hidden_size=64, intermediate_size=96, head_dim=16).train()
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def gradients(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_gradients_are_close_to_those_of_the_dense_base(model_type, targets, compiled, tmp_path):
    model = make(tmp_path, model_type, targets)
    wanted_loss, wanted = gradients(model)
    cfg = DictDefault(KERNELS)
    apply_lora_kernel_patches(model, cfg)
    apply_fp8_base(model, cfg)
    quantized = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    layers = len(model.base_model.model.model.layers)
    # A projection that reads its input alone and has no adapter does not run as an operator.
    assert len(quantized) == (7 if targets == "all-linear" else 6) * layers
    if compiled:
        torch._dynamo.reset()
        compile_layers(model, {"backend": "aot_eager"})
    loss, got = gradients(model)
    assert loss == pytest.approx(float(wanted_loss), rel=0.02)
    # Three bits behind the point, in two layers of large random weights: a wrong scale or factor is off by far more.
    assert (got - wanted).norm() < 0.35 * wanted.norm()
    model.eval()
    with torch.no_grad():
        assert model(input_ids=IDS, labels=IDS).loss == pytest.approx(float(wanted_loss), rel=0.02)
    model.generate(input_ids=IDS[:1, :4], max_new_tokens=2)


def test_a_model_without_fused_layers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has none of them"):
        apply_fp8_base(make(tmp_path, "llama", "all-linear"), DictDefault())
