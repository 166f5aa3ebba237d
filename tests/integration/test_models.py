"""Per architecture: the first step that `axolotl train` takes is the one that plain transformers would take.

The reference runs the raw rows one by one through the model as transformers loads it, adds up the token losses and divides by
their number; nothing of this package is in it. Compared are the logged loss, the evaluation loss before the first step, and
every weight after one step of plain SGD, which is the gradient. Packed rows fill their bins exactly, so that a run of one step
sees them all. A new architecture is one row of `MODELS`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from axolotl.cli.main import run
from tests.tiny import make_tiny_model, make_tiny_tokenizer

SEQUENCE_LEN = 64
LENGTHS = (34, 30, 40, 24, 12, 52, 60, 4)  # pairs of neighbours fill a bin of SEQUENCE_LEN
LEARNING_RATE = 0.1
VOCAB = 400  # more than the tokenizer has: some tokenizer classes add a token of their own

WINDOW = {"sliding_window": 8}
ROUTER = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
GPT = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

# Name -> config class, and what makes the model itself: windows, soft caps, scales, experts, latent attention, learnt positions.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3, tied": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "mistral, window": ("MistralConfig", WINDOW),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **ROUTER}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32, **ROUTER}),
    "gemma2, soft caps": (
        "Gemma2Config",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0, **WINDOW},
    ),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 6, **WINDOW}),
    "phi2": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "phi3, window": ("Phi3Config", {"pad_token_id": 0, **WINDOW}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": False, "multi_query": True, "alibi": False}),
    "gpt2": ("GPT2Config", GPT),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "bloom, alibi": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "starcoder2": ("Starcoder2Config", {"residual_dropout": 0.0, "embedding_dropout": 0.0, **WINDOW}),
    "olmo2": ("Olmo2Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "granite, scales": (
        "GraniteConfig",
        {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "cohere2, scale": ("Cohere2Config", {"logit_scale": 0.5, "num_hidden_layers": 4, **WINDOW}),
    "deepseek_v3": ("DeepseekV3Config", LATENT),
    "nemotron": ("NemotronConfig", {"head_dim": 8}),
    "gpt_oss, sinks": ("GptOssConfig", {"head_dim": 8, "num_local_experts": 4, **ROUTER, **WINDOW}),
}  # fmt: skip


def make_rows() -> list[dict[str, list[int]]]:
    """Rows of `LENGTHS`, the first tokens of most of them masked."""
    rng = random.Random(3)
    rows = []
    for length, masked in zip(LENGTHS, (0, 3, 20, 0, 5, 20, 1, 1), strict=True):
        ids = [rng.randrange(8, 384) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:], "attention_mask": [1] * length})
    return rows


ROWS = make_rows()


@dataclass
class Reference:
    """What plain transformers makes of `ROWS`: the loss, and the weights before and after a step of SGD."""

    folder: Path
    routes: bool
    loss: float = 0.0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    stepped: dict[str, torch.Tensor] = field(default_factory=dict)


def row_losses(model: Any) -> torch.Tensor:
    """Mean token loss of `ROWS`, each alone in the model."""
    total, count = torch.zeros(()), 0
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total = total + F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def router_loss(model: Any) -> torch.Tensor:
    """The load-balancing loss of all rows in one padded batch: it is not a sum over rows."""
    width = max(LENGTHS)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in ROWS])
    mask = torch.tensor([row["attention_mask"] + [0] * (width - len(row["input_ids"])) for row in ROWS])
    return model.config.router_aux_loss_coef * model(input_ids=ids, attention_mask=mask).aux_loss


@pytest.fixture(scope="module", params=list(MODELS))
def reference(request, tmp_path_factory) -> Reference:
    class_name, own = MODELS[request.param]
    if not hasattr(transformers, class_name):
        pytest.skip(f"this transformers has no {class_name}")
    folder = tmp_path_factory.mktemp("model")
    make_tiny_tokenizer(folder)
    make_tiny_model(folder, class_name, vocab_size=VOCAB, **own)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    found = Reference(folder, routes="output_router_logits" in own)
    loss = row_losses(model) + (router_loss(model) if found.routes else 0.0)
    loss.backward()
    found.loss = loss.item()
    for name, weight in model.named_parameters():
        step = LEARNING_RATE * (weight.grad if weight.grad is not None else torch.zeros_like(weight))
        found.weights[name], found.stepped[name] = weight.detach(), weight.detach() - step
    return found


def train_one_step(folder: Path, model: Path, **keys: Any) -> dict[str, float]:
    """The logged figures of a run over `ROWS` in one step. What it saved lies in `out`."""
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    dataset = {"path": str(data), "ds_type": "json"}
    config = {
        "base_model": str(model), "datasets": [dataset], "test_datasets": [{**dataset, "split": "train"}],
        "sequence_len": SEQUENCE_LEN, "num_epochs": 1, "learning_rate": LEARNING_RATE, "lr_scheduler": "constant", "warmup_steps": 0,
        "optimizer": "sgd", "max_grad_norm": 1e9, "weight_decay": 0.0, "bf16": False, "logging_steps": 1, "save_strategy": "no",
        "output_dir": str(folder / "out"), "dataset_prepared_path": str(folder / "prepared"), **keys,
    }  # fmt: skip
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    assert run(["train", str(folder / "config.yml")]) == 0
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 1
    before = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    return {"loss": losses[0], "eval_loss": before}


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
def test_first_step(reference: Reference, packed: bool, tmp_path: Path, capsys) -> None:
    batches = 4 if packed else 8
    # The load-balancing loss depends on what is routed together, so models with one take all rows at once.
    size = batches if reference.routes else batches // 4
    keys = {"micro_batch_size": size, "gradient_accumulation_steps": batches // size, "eval_batch_size": batches}
    figures = train_one_step(tmp_path, reference.folder, sample_packing=packed, **keys)
    capsys.readouterr()
    assert figures == pytest.approx({"loss": reference.loss, "eval_loss": reference.loss}, rel=1e-5)
    largest = max(float((reference.stepped[name] - weight).abs().max()) for name, weight in reference.weights.items())
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, weight in trained.named_parameters():
        torch.testing.assert_close(
            weight.detach(), reference.stepped[name], rtol=1e-4, atol=1e-4 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
def test_first_step_in_four_bits(packed: bool, tmp_path: Path, capsys) -> None:
    """A new adapter changes nothing yet, so the loss is that of the quantized model, and evaluating first must not change it."""
    pytest.importorskip("bitsandbytes")
    make_tiny_tokenizer(tmp_path / "model")
    make_tiny_model(tmp_path / "model", vocab_size=VOCAB, hidden_size=64)
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, quantization_config=four_bits)
    loss = row_losses(model.train()).item()
    qlora = {"adapter": "qlora", "load_in_4bit": True, "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
    batches = 4 if packed else 8
    figures = train_one_step(
        tmp_path,
        tmp_path / "model",
        sample_packing=packed,
        gradient_accumulation_steps=batches,
        micro_batch_size=1,
        **qlora,
    )
    capsys.readouterr()
    assert figures == pytest.approx({"loss": loss, "eval_loss": loss}, rel=1e-5)
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(weight.any() for name, weight in adapter.items() if "lora_B" in name), "every layer gets a gradient"
