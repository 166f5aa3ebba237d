"""LoRA on a tied embedding and head: one pair of matrices, in training and in files."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl.loaders.tied_factors import share_tied_factors
from tests.tiny import make_tiny_llama

IDS = torch.arange(16).reshape(2, 8)


def adapt(folder, dtype, *, share=True, **config):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lora = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "embed_tokens"], **config})
    adapted = get_peft_model(model, lora)
    if share:
        share_tied_factors(adapted)
    return adapted


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    make_tiny_llama(folder, tie_word_embeddings=True)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_both_ends_train_one_pair(base, dtype, target, tmp_path):
    model = adapt(base, dtype, target_modules=["q_proj", target], ensure_weight_tying=True)
    assert not any("lm_head" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for head, embedding in (("A", "B"), ("B", "A")):
        mine = saved[f"base_model.model.lm_head.lora_{head}.weight"]
        theirs = saved[f"base_model.model.model.embed_tokens.lora_embedding_{embedding}"]
        assert torch.equal(mine, theirs.T) and mine.abs().max() > 0
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), tmp_path)
    with torch.no_grad():
        expected = model.eval()(IDS).logits
        torch.testing.assert_close(loaded.eval()(IDS).logits, expected, rtol=0, atol=0)
        fresh = adapt(base, dtype, target_modules=["q_proj", target], ensure_weight_tying=True)
        fresh.load_adapter(tmp_path, "default", is_trainable=True)
        torch.testing.assert_close(fresh.eval()(IDS).logits, expected, rtol=0, atol=0)


def test_the_gradient_is_the_sum_of_both_ends(base):
    model = adapt(base, torch.float32, ensure_weight_tying=True, init_lora_weights=False)
    apart = adapt(base, torch.float32, share=False, ensure_weight_tying=True)
    apart.load_state_dict(model.state_dict())
    grads = {}
    for which in (model, apart):
        which.eval()(input_ids=IDS, labels=IDS).loss.backward()
        embedding, head = which.get_input_embeddings(), which.get_output_embeddings()
        grads[which] = (embedding.lora_embedding_A["default"].grad, embedding.lora_embedding_B["default"].grad)
    torch.testing.assert_close(grads[model][0], grads[apart][0] + head.lora_B["default"].weight.grad.T)
    torch.testing.assert_close(grads[model][1], grads[apart][1] + head.lora_A["default"].weight.grad.T)


def test_untied_adapters_stay(base):
    model = adapt(base, torch.bfloat16, target_modules=["q_proj", "lm_head"])
    assert type(model.get_base_model().lm_head.lora_A["default"]) is torch.nn.Linear
