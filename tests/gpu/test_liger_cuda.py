"""The `liger_*` and `cut_cross_entropy` keys on CUDA: loss and gradients against the plain model, per key and architecture.

pytest tests/gpu/test_liger_cuda.py
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from axolotl.integrations.liger import apply
from axolotl.integrations.liger.apply import LAYER_KEYS, apply_liger_kernels, remove_liger_kernels
from axolotl.integrations.liger.kernels import load_liger_kernels
from axolotl.kernels.glu import gated
from axolotl.utils.dict import DictDefault
from tests.integration.training_runs import make_trainer, steps_of
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

MODELS = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "Olmo2Config",
    "Glm4Config",
    "StableLmConfig",
]
SHAPE = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
NO_LIGER = "liger-kernel is not installed"


def model_of(path, architecture: str, dtype: torch.dtype):
    shape = SHAPE if architecture not in ("phi3", "StableLmConfig") else {**SHAPE, "head_dim": None}
    shape = {key: value for key, value in shape.items() if value is not None}
    model = make_tiny_model(path, architecture, **shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
            else:
                parameter.mul_(0.5)
    return model.to("cuda", dtype).train()


def loss_and_gradients(model, autocast: bool = False) -> tuple[float, torch.Tensor]:
    ids = torch.randint(3, 384, (2, 150), generator=torch.Generator().manual_seed(0)).cuda()
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def check_same(model, cfg: DictDefault, tolerance: float, autocast: bool = False) -> dict[str, object]:
    wanted_loss, wanted = loss_and_gradients(model, autocast)
    apply_liger_kernels(cfg, model)
    try:
        loss, got = loss_and_gradients(model, autocast)
    finally:
        remove_liger_kernels(model)
    assert loss == pytest.approx(wanted_loss, rel=tolerance)
    assert (got - wanted).norm() <= tolerance * wanted.norm()
    return {entry["key"]: entry["value"] for entry in cfg.resolution}


@pytest.mark.parametrize("package", [True, False])
@pytest.mark.parametrize("key", LAYER_KEYS)
@pytest.mark.parametrize("architecture", MODELS)
def test_each_key_in_fp32(tmp_path, monkeypatch, architecture, key, package):
    if package and isinstance(load_liger_kernels(), str):
        pytest.skip(NO_LIGER)
    if not package:
        monkeypatch.setattr(apply, "load_liger_kernels", lambda impl: NO_LIGER)
    noted = check_same(model_of(tmp_path, architecture, torch.float32), DictDefault({key: True}), 1e-4)
    if key in ("liger_glu_activation",) or (key == "liger_rms_norm" and architecture != "StableLmConfig"):
        count, _, total, *_ = str(noted[key]).split()
        assert count == total


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("package", [True, False])
@pytest.mark.parametrize("architecture", MODELS)
def test_all_keys_in_bf16(tmp_path, monkeypatch, architecture, package, autocast):
    if package and isinstance(load_liger_kernels(), str):
        pytest.skip(NO_LIGER)
    if not package:
        monkeypatch.setattr(apply, "load_liger_kernels", lambda impl: NO_LIGER)
    model = model_of(tmp_path, architecture, torch.bfloat16)
    check_same(model, DictDefault(dict.fromkeys(LAYER_KEYS, True)), 6e-2, autocast)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_with_an_adapter_and_checkpointing(tmp_path, architecture):
    model = get_peft_model(
        model_of(tmp_path, architecture, torch.float32),
        LoraConfig(r=8, target_modules="all-linear", modules_to_save=["norm"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    check_same(model, DictDefault(dict.fromkeys(LAYER_KEYS, True)), 1e-4)


def test_a_model_on_the_cpu_runs_beside_one_with_kernels(tmp_path):
    other = make_tiny_model(tmp_path / "other").train()
    ids = torch.randint(3, 384, (1, 20))
    wanted = other(input_ids=ids).logits
    model = model_of(tmp_path / "model", "llama", torch.float32)
    apply_liger_kernels(DictDefault(dict.fromkeys(LAYER_KEYS, True)), model)
    try:
        assert torch.equal(other(input_ids=ids).logits, wanted)
    finally:
        remove_liger_kernels(model)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 1023), (7, 14336)])
def test_gated_activation_with_autograd(act, dtype, tolerance, shape):
    torch.manual_seed(0)
    gate, up, grad = ((2 * torch.randn(shape, device="cuda")).to(dtype) for _ in range(3))
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    h = gated(leaves[0], leaves[1], act)
    kept = grad.clone()
    got = torch.autograd.grad(h, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(h, leaves, grad)
    assert torch.equal(grad, kept)
    wide = [gate.double().requires_grad_(), up.double().requires_grad_()]
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    wanted_h = functions[act](wide[0]) * wide[1]
    wanted = torch.autograd.grad(wanted_h, wide, grad.double())
    for ours, twice, theirs in zip((h, *got), (h, *again), (wanted_h, *wanted), strict=True):
        assert torch.equal(ours, twice)
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("kwargs", [{}, {"label_smoothing_factor": 0.1}, {"loss_token_scaling": True}])
def test_the_loss_without_logits_trains_as_the_one_with_them(tmp_path, kwargs):
    runs = [
        make_trainer(tmp_path / str(fused), fused_linear_loss=fused, use_cpu=False, max_steps=3, **kwargs)
        for fused in (True, False)
    ]
    for trainer in runs:
        trainer.train()
    for ours, theirs in zip(*(steps_of(trainer) for trainer in runs), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
