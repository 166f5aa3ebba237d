"""fp8 on CUDA: the matmuls of all recipes, eager and compiled, and a model that trains with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from axolotl.kernels.fp8 import FP8, quantize_rows
from axolotl.kernels.fp8_linear import RECIPES, linear_fp8
from axolotl.monkeypatch.attention import varlen
from axolotl.monkeypatch.attention.documents import add_document_hook
from axolotl.monkeypatch.compile_layers import compile_layers
from axolotl.monkeypatch.fp8_linear import apply_fp8_training
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no CUDA device with fp8"
    ),
]


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    theirs = theirs.detach().double().cpu()
    return float((ours.detach().double().cpu() - theirs).norm() / theirs.norm())


def results(function, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, recipe: str) -> list[torch.Tensor]:
    x, weight = (tensor.detach().clone().requires_grad_() for tensor in (x, weight))
    y = function(x, weight, None, recipe)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rows, compiled", [(256, False), (21, False), (21, True)])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_matmuls_are_those_of_a_cpu(weight_dtype, rows, compiled, recipe):
    """The CPU multiplies the same quantized factors in fp32; `kernels/fp8_linear_test.py` compares it with fp64."""
    torch.manual_seed(0)
    x = (torch.randn(rows, 256) * torch.logspace(-2, 1, 256)).bfloat16()
    weight = (torch.randn(384, 256) * torch.logspace(-3, 0, 384)[:, None]).to(weight_dtype)
    grad = (torch.randn(rows, 384) * torch.logspace(-6, -3, rows)[:, None]).bfloat16()
    torch._dynamo.reset()
    function = torch.compile(linear_fp8, fullgraph=True) if compiled else linear_fp8
    ours = results(function, x.cuda(), weight.cuda(), grad.cuda(), recipe)
    for mine, theirs in zip(ours, results(linear_fp8, x, weight, grad, recipe), strict=True):
        # bf16 results, and sums with about 14 bits, in which large products swallow small ones.
        assert mine.dtype == theirs.dtype and far(mine, theirs) < 0.02


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value, recipe):
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    weight, grad = torch.randn_like(x), torch.randn_like(x)
    x[5, 3] = value
    y, _, grad_weight = results(linear_fp8, x, weight, grad, recipe)
    assert not y[5].isfinite().any()
    assert not grad_weight[:, 3].isfinite().any()


def test_the_compiler_keeps_what_is_not_a_number():
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    weight, grad = torch.randn_like(x), torch.randn_like(x)
    x[5, 3] = float("nan")
    torch._dynamo.reset()
    y, _, grad_weight = results(torch.compile(linear_fp8, fullgraph=True), x, weight, grad, "tensorwise")
    assert not y[5].isfinite().any()
    assert not grad_weight[:, 3].isfinite().any()


@pytest.mark.parametrize("columns", [64, 2048, 5000])
def test_rows_are_quantized_as_on_a_cpu(columns):
    torch.manual_seed(0)
    x = torch.randn(9, columns).bfloat16()
    x[1], x[2, 7], x[3] = 0.0, 1e4, x[3] * 1e-6
    data, scale = quantize_rows(x.cuda())
    wanted, wanted_scale = quantize_rows(x)
    torch.testing.assert_close(scale.cpu(), wanted_scale)
    assert data.dtype == FP8 and far(data.float().cpu() * wanted_scale, wanted.float() * wanted_scale) < 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_does_not_become_one_that_is(value):
    x = torch.randn(4, 3000, device="cuda").bfloat16()
    x[2, 2500] = value
    data, scale = quantize_rows(x)
    back = data.float() * scale
    assert not back[2, 2500].isfinite()
    assert back[[0, 1, 3]].isfinite().all()


def make(folder) -> nn.Module:
    varlen.register()
    model = make_tiny_model(folder, "llama", hidden_size=256, head_dim=64, intermediate_size=768)
    model = model.cuda().bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.2)
    model.config._attn_implementation = varlen.NAME
    model.config.use_cache = False
    add_document_hook(model, varlen=True)
    return model.train()


def packed(*lengths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(3, 384, (1, sum(lengths)), generator=generator).cuda()
    positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float() for p in model.parameters()])


@pytest.mark.parametrize(
    "recipe, checkpointing",
    [("tensorwise", False), ("tensorwise", True), ("rowwise", False), ("rowwise_with_gw_hp", True)],
)
def test_a_compiled_model_on_packed_rows(recipe, checkpointing, tmp_path):
    model = make(tmp_path)
    batches = [packed(*lengths) for lengths in ((200, 56), (90, 90, 76), (250, 6), (10, 50, 150, 46))]
    dense = [gradients(model, batch) for batch in batches]
    apply_fp8_training(model, DictDefault(fp8_config={"recipe": recipe}))
    torch._dynamo.reset()
    counters.clear()
    compile_layers(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for batch, (wanted_loss, wanted) in zip(batches, dense, strict=True):
        loss, got = gradients(model, batch)
        assert loss == pytest.approx(wanted_loss, rel=0.01)
        assert far(got, wanted) < 0.2
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_learns_as_it_does_in_bf16(recipe, tmp_path):
    def train(model: nn.Module) -> list[float]:
        # At three times the rate chance decides: a recipe's losses then differ by a third from one start to the next.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(40):
            loss, _ = gradients(model, packed(128, 64 + step % 4, 64 - step % 4))
            optimizer.step()
            losses.append(loss)
        return losses

    wanted = train(make(tmp_path))
    model = make(tmp_path)
    apply_fp8_training(model, DictDefault(fp8_config={"recipe": recipe}))
    losses = train(model)
    assert wanted[-1] < 0.5 * wanted[0]
    assert sum(losses) == pytest.approx(sum(wanted), rel=0.03)
    assert sum(losses[-10:]) == pytest.approx(sum(wanted[-10:]), rel=0.05)
