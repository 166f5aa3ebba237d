"""The kernels in whole models against the models without them, and what is said where they do not run."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from axolotl.integrations.liger import apply, kernels, swap
from axolotl.integrations.liger.apply import LAYER_KEYS, apply_liger_kernels, remove_liger_kernels
from axolotl.integrations.liger.kernels import LigerKernels
from axolotl.integrations.liger.mlps import read_activation, read_projections
from axolotl.integrations.liger.norms import RmsNormKind, read_rms_norm, torch_rms_norm
from axolotl.integrations.liger.rope import restore_rope
from axolotl.monkeypatch.compile_layers import compile_layers, uncompile_layers
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
from axolotl.monkeypatch.tiled_mlp import apply_tiled_mlp
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_model

ALL = dict.fromkeys(LAYER_KEYS, True)


def torch_rope(q, k, cos, sin):
    """What liger-kernel's function computes."""
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        scaled = grad * sin[:, None]
        first, second = scaled.chunk(2, dim=-1)
        return grad * cos[:, None] + torch.cat([second, -first], -1), None, None


STAND_IN = LigerKernels(
    "stand-in", torch_rms_norm, lambda x, w, b, eps: nn.functional.layer_norm(x, w.shape, w, b, eps), torch_rope
)


@pytest.fixture
def on_this_cpu(monkeypatch) -> Iterator[None]:
    """The kernels' PyTorch bodies run where CUDA would run Triton."""
    monkeypatch.setattr(swap, "runs_fused", lambda x: True)
    monkeypatch.setattr(apply, "load_liger_kernels", lambda impl: STAND_IN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield


@pytest.fixture(autouse=True)
def rotations_as_before(monkeypatch) -> Iterator[None]:
    """A rotation belongs to the module that the code is in, which other tests use, too."""
    fused: list[nn.Module] = []
    fuse_rope = apply.fuse_rope
    monkeypatch.setattr(apply, "fuse_rope", lambda model, kernel: fused.append(model) or fuse_rope(model, kernel))
    yield
    for model in fused:
        restore_rope(model)


def noted(cfg: DictDefault) -> dict[str, tuple[object, str]]:
    return {entry["key"]: (entry["value"], entry["reason"]) for entry in cfg.resolution or []}


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(3, 384, (2, 24), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_same(model: nn.Module, cfg: DictDefault) -> None:
    plain = loss_and_gradients(model)
    apply_liger_kernels(cfg, model)
    swapped = loss_and_gradients(model)
    torch.testing.assert_close(swapped, plain, rtol=2e-4, atol=2e-6)


MODELS = [
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "Olmo2Config",
    "Qwen3NextConfig",
    "Glm4Config",
    "StableLmConfig",
]


@pytest.mark.parametrize("architecture", MODELS)
def test_every_kernel_in_every_kind_of_model(tmp_path, architecture, on_this_cpu):
    model = make_tiny_model(tmp_path, architecture).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    cfg = DictDefault(ALL)
    before = {name: type(module) for name, module in model.named_modules()}
    random_state = torch.get_rng_state()
    try:
        check_same(model, cfg)
        assert torch.equal(torch.get_rng_state(), random_state)
        changed = {name for name, module in model.named_modules() if type(module) is not before[name]}
        assert any("mlp" in name for name in changed)
        assert any("norm" in name for name in changed)
        assert set(ALL) <= set(noted(cfg))
        again = copy.deepcopy(model)
        torch.testing.assert_close(loss_and_gradients(again)[0], loss_and_gradients(model)[0], rtol=0, atol=0)
    finally:
        remove_liger_kernels(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("key", LAYER_KEYS)
def test_each_key_says_what_runs(tmp_path, key, on_this_cpu):
    model = make_tiny_model(tmp_path).train()
    cfg = DictDefault({key: True})
    try:
        check_same(model, cfg)
    finally:
        remove_liger_kernels(model)
    wanted = {
        "liger_rope": ("1 of 1 kinds of rotation", "stand-in"),
        "liger_rms_norm": ("5 of 5 RMS norms", "stand-in"),
        "liger_rms_norm_gated": (False, "has no RMS norms with a gate"),
        "liger_layer_norm": (False, "has no layer norms"),
        "liger_glu_activation": ("2 of 2 gated MLPs", "axolotl.kernels.glu"),
    }[key]
    ((value, reason),) = noted(cfg).values()
    assert value == wanted[0]
    assert wanted[1] in reason


def test_without_the_package_pytorchs_norm_runs(tmp_path, on_this_cpu, monkeypatch):
    monkeypatch.setattr(apply, "load_liger_kernels", lambda impl: "liger-kernel is not installed")
    model = make_tiny_model(tmp_path).train()
    cfg = DictDefault(ALL)
    check_same(model, cfg)
    assert noted(cfg)["liger_rms_norm"] == ("5 of 5 RMS norms", "PyTorch's kernel: liger-kernel is not installed")
    assert noted(cfg)["liger_glu_activation"][0] == "2 of 2 gated MLPs"
    assert noted(cfg)["liger_rope"][0] is False


def test_on_a_laptop_nothing_changes_and_it_is_said(tmp_path):
    model = make_tiny_model(tmp_path)
    before = {name: type(module) for name, module in model.named_modules()}
    cfg = DictDefault(ALL | {"liger_kernel_impl": "cutile"})
    apply_liger_kernels(cfg, model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert {value for value, _ in noted(cfg).values()} == {False}
    assert all("no CUDA device" in reason for _, reason in noted(cfg).values())


def test_compiled_layers_are_left_to_the_compiler(tmp_path, on_this_cpu):
    model = make_tiny_model(tmp_path)
    compile_layers(model)
    cfg = DictDefault(ALL)
    before = {name: type(module) for name, module in model.named_modules()}
    apply_liger_kernels(cfg, model)
    uncompile_layers(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all("compiled layers" in reason for _, reason in noted(cfg).values())


def test_lora_kernels_keep_their_mlps(tmp_path, on_this_cpu):
    model = get_peft_model(make_tiny_model(tmp_path), LoraConfig(r=4, target_modules="all-linear")).train()
    cfg = DictDefault({"liger_glu_activation": True, "liger_rms_norm": True, "lora_mlp_kernel": True})
    apply_lora_kernel_patches(model, cfg)
    check_same(model, cfg)
    assert noted(cfg)["liger_glu_activation"] == (
        "0 of 2 gated MLPs",
        "none fits; 2 stay because the LoRA kernels run it",
    )
    assert noted(cfg)["liger_rms_norm"][0] == "5 of 5 RMS norms"


def test_an_adapter_without_lora_kernels_and_trained_norms(tmp_path, on_this_cpu):
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["norm", "input_layernorm"])
    model = get_peft_model(make_tiny_model(tmp_path), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    check_same(model, DictDefault(ALL))


def test_tiled_mlps_run_the_kernel_in_pieces(tmp_path, on_this_cpu):
    model = make_tiny_model(tmp_path).train()
    apply_tiled_mlp(model, 3)
    calls = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    check_same(model, DictDefault({"liger_glu_activation": True, "tiled_mlp": True, "tiled_mlp_num_shards": 3}))
    assert hasattr(type(model.model.layers[0].mlp), swap._BASE)
    assert len(calls) == 2 * 2 * 3  # two passes, each with a recomputation


def test_what_differs_between_layers_of_one_class_is_seen():
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x) * self.factor) * self.up_proj(x))

    names = read_projections(Scaled(1.0))
    assert names is not None
    assert read_activation(Scaled(1.0), names) == "silu"
    assert "something else" in read_activation(Scaled(0.5), names)


def test_norms_that_only_look_like_one():
    class Norm(nn.Module):
        def __init__(self, power=2.0, offset=0.0):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))
            self.eps, self.power, self.offset = 1e-6, power, offset

        def forward(self, x):
            return (
                x
                / (x.abs().pow(self.power).mean(-1, keepdim=True) + self.eps) ** (1 / self.power)
                * (self.weight + self.offset)
            )

    assert read_rms_norm(Norm()) in (RmsNormKind("eps", 0.0, "llama"), RmsNormKind("eps", 0.0, "gemma"))
    assert isinstance(read_rms_norm(Norm(offset=1.0)), RmsNormKind)
    assert "something else" in str(read_rms_norm(Norm(power=1.0)))
    assert "something else" in str(read_rms_norm(Norm(offset=0.5)))


def test_another_kernel_language_needs_its_package():
    assert "cutlass" in str(kernels.why_not_impl("cutedsl"))
    assert "cuda.tile" in str(kernels.why_not_impl("cutile"))
