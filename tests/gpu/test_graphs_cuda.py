"""CUDA graphs of compiled layers: the gradients are those of the same layers launched one kernel at a time, to the last bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from axolotl.monkeypatch.attention import varlen
from axolotl.monkeypatch.attention.documents import add_document_hook
from axolotl.monkeypatch.compile_layers import compile_layers
from axolotl.monkeypatch.layer_graphs import WARM_UP, graph_layers
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
from axolotl.utils.collators import BatchSamplerDataCollatorForSeq2Seq
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

KERNELS = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}


def make_model(folder, model_type: str = "llama", *, packed: bool = False) -> torch.nn.Module:
    torch._dynamo.reset()
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_hidden_layers": 3}
    model = make_tiny_model(folder, model_type, **sizes).cuda().bfloat16()
    model.config.use_cache = False
    if packed:
        varlen.register()
        model.config._attn_implementation = varlen.NAME
        add_document_hook(model, varlen=True)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    model.enable_input_require_grads()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    apply_lora_kernel_patches(model, DictDefault(KERNELS))
    compile_layers(model)
    return model


def full_rows(seed: int, length: int = 128) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 384, (2, length), generator=torch.Generator().manual_seed(seed)).cuda()
    return {"input_ids": ids, "labels": ids}


def packed_rows(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    lengths = [40 + 3 * seed, 60, 90 - 3 * seed]
    rows = [torch.randint(3, 384, (length,), generator=generator).tolist() for length in lengths]
    padding = SimpleNamespace(pad_token_id=2, padding_side="right")
    collate = BatchSamplerDataCollatorForSeq2Seq(padding, pad_to_multiple_of=256, varlen=True)
    batch = collate([[{"input_ids": row, "labels": row} for row in rows]])
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def gradients(model, batches) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of an optimizer step that accumulates over the batches."""
    model.zero_grad()
    losses = []
    for batch in batches:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize("make_batch", [full_rows, packed_rows])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_accumulated_gradients(model_type, make_batch, tmp_path):
    model = make_model(tmp_path, model_type, packed=make_batch is packed_rows)
    steps = [[make_batch(3 * step + micro) for micro in range(3)] for step in range(4)]
    for step in steps:
        gradients(model, step)  # everything is compiled, also for lengths that vary
    wanted = [gradients(model, step) for step in steps]
    graphs = graph_layers(model)
    for step in steps[:2]:
        gradients(model, step)  # warm-up
    found = [gradients(model, step) for step in steps]
    assert graphs.failed is None
    assert graphs.num_shapes == 1
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)


def test_checkpointed_layers(tmp_path):
    model = make_model(tmp_path)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step = [full_rows(1), full_rows(2)]
    wanted = gradients(model, step)
    graphs = graph_layers(model)
    for _ in range(4):
        found = gradients(model, step)
    assert graphs.num_shapes == 1
    assert_same(found, wanted)


def test_weights_that_change_are_read_anew(tmp_path):
    model = make_model(tmp_path)
    step = [full_rows(1)]
    graphs = graph_layers(model)
    for _ in range(WARM_UP + 2):
        gradients(model, step)
    assert graphs.num_shapes == 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    found = gradients(model, step)
    graphs.failed = "switched off by this test"
    assert_same(found, gradients(model, step))


def test_other_shapes_and_evaluation_in_between(tmp_path):
    model = make_model(tmp_path)
    step, other = [full_rows(1), full_rows(2)], [full_rows(3, length=96)]
    for _ in range(2):  # from the second time on, the code that serves both lengths
        wanted, wanted_other = gradients(model, step), gradients(model, other)
    graphs = graph_layers(model)
    for _ in range(3):
        gradients(model, step)
    found_other = gradients(model, other)
    with torch.no_grad():
        model.eval()
        model(**full_rows(4))
        model.train()
    assert_same(gradients(model, step), wanted)
    assert graphs.num_shapes == 1
    assert found_other[0] == pytest.approx(wanted_other[0], rel=1e-3)


def test_an_evaluation_gets_the_memory_if_it_is_short(tmp_path, monkeypatch):
    model = make_model(tmp_path)
    step = [full_rows(1)]
    graphs = graph_layers(model)
    for _ in range(WARM_UP + 2):
        wanted = gradients(model, step)
    assert graphs.num_shapes == 1
    with monkeypatch.context() as short, torch.no_grad():
        short.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
        model.eval()
        model(**full_rows(4))
        model.train()
    assert graphs.num_shapes == 0
    assert_same(gradients(model, step), wanted)
    assert graphs.num_shapes == 1


def test_two_forwards_before_a_backward(tmp_path):
    """The second one runs without graphs, which would write over what the first one's backward needs."""
    model = make_model(tmp_path)
    one, other = full_rows(1), full_rows(2)
    model.zero_grad()
    graphs = graph_layers(model)
    for _ in range(WARM_UP + 1):
        wanted = gradients(model, [one, other])[1]
    assert graphs.num_shapes == 1
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**one).loss + model(**other).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5), name


def test_a_layer_that_waits_for_the_gpu_is_not_recorded(tmp_path):
    model = make_model(tmp_path)
    graphs = graph_layers(model)
    layer = model.get_base_model().model.layers[1]
    compiled = layer.forward._compiled

    def waits(hidden, **kwargs):
        assert hidden.abs().sum().item() >= 0
        return compiled(hidden, **kwargs)

    layer.forward._compiled = waits
    step = [full_rows(1)]
    found = [gradients(model, step) for _ in range(WARM_UP + 3)]
    assert graphs.failed is not None
    assert_same(found[0], found[-1])
    assert torch.rand(2, device="cuda").isfinite().all()  # random numbers are to be had as before
