"""The pass over graphs that the compiler has differentiated: what it changes, what it leaves alone, and the gradients of both."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import fx
from torch._dynamo.utils import counters

from axolotl.kernels import lora_ops
from axolotl.kernels.lora_graph import LORA_GRAPH
from axolotl.kernels.lora_ops import mlp_in_graph, project_in_graph
from axolotl.monkeypatch.compile_layers import _default_options, compile_layers
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches
from axolotl.utils.dict import DictDefault
from tests.backward_graphs import GraphRecorder, calls
from tests.tiny import make_tiny_model

KERNELS = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}
OURS = torch.ops.axolotl
READERS = {OURS.lora_project_backward.default: 9, OURS.lora_project_apart_backward.default: 8}
"""Operators that take x, and where their `row_scale` is."""
ENDS = {OURS.lora_project.default: 7, OURS.lora_down.default: 11}
"""Operators to whose output a residual may be added, and where their `residual` is."""
ENDS_WEIGHTS = {OURS.lora_project.default: 1, OURS.lora_down.default: 3}
"""Where their weights are: the projections of an attention's input are several."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- what the graphs do ---------------------------------------------------------------------------------------------------


def scaled(graphs: list[fx.GraphModule]) -> list[bool]:
    """Of every gradient of projections, whether it reads the input of a norm."""
    return [
        len(node.args) > place and isinstance(node.args[place], fx.Node)
        for graph in graphs
        for operator, place in READERS.items()
        for node in calls(graph, operator)
    ]


def is_read(node: fx.Node) -> bool:
    """Whether more than its size is."""
    size, view = torch.ops.aten.sym_size.int, torch.ops.aten.view.default
    return any(user.target is not size and (user.target is not view or is_read(user)) for user in node.users)


def norms_formed(graph: fx.GraphModule) -> int:
    """Products of a vector, the weight of a norm, and something that no gradient reaches."""
    backward, found = set(), 0
    for node in graph.graph.nodes:
        if "tangents" in str(node.target) or not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
        elif node.target is torch.ops.aten.mul.Tensor:
            found += is_read(node) and 1 in [arg.meta["val"].dim() for arg in node.all_input_nodes]
    return found


def sums(graphs: list[fx.GraphModule]) -> list[bool]:
    """Of the end of every attention and of every MLP, whether it adds a residual."""
    return [
        len(node.args) > place
        for graph in graphs
        for operator, place in ENDS.items()
        for node in calls(graph, operator)
        if len(node.args[ENDS_WEIGHTS[operator]]) == 1
    ]


def far(grads: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert grads.keys() == wanted.keys()
    distance = sum((grads[name].double() - grad).square().sum() for name, grad in wanted.items())
    return float((distance / sum(grad.square().sum() for grad in wanted.values())) ** 0.5)


# --- layers of models -----------------------------------------------------------------------------------------------------


def make(model_type: str, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    model = make_tiny_model(folder, model_type).to(dtype)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "norm" in name:
            parameter.data += torch.randn(parameter.shape) * 0.2
    return apply_lora_kernel_patches(model, DictDefault(KERNELS)).train()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, model.config.vocab_size, (8, 96), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compiled_gradients(model: torch.nn.Module, joint_pass=None) -> tuple[dict[str, torch.Tensor], GraphRecorder]:
    torch._dynamo.reset()
    model, recorder = copy.deepcopy(model), GraphRecorder(joint_pass)
    compile_layers(model, {"backend": recorder})
    return gradients(model), recorder


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [(name, torch.bfloat16) for name in ("llama", "qwen2", "qwen3", "gemma3_text")] + [("llama", torch.float32)],
)
def test_layers_form_no_norm_again(model_type, dtype, tmp_path):
    model = make(model_type, tmp_path, dtype)
    wanted = gradients(copy.deepcopy(model).double())
    before, plain = compiled_gradients(model)
    after, passed = compiled_gradients(model, LORA_GRAPH)
    for recorder, is_passed in ((plain, False), (passed, True)):
        # Of the layer whose input takes no gradient, and of the others.
        layers = [graph for graph in recorder.backward if calls(graph, OURS.lora_down_backward.default)]
        assert len(layers) == 2
        # Two of three projections read a norm: the end of the attention does not.
        assert sorted(scaled(layers)) == [False] * 2 + [is_passed] * 4
        # Gemma's other norms are formed again for sums of them.
        assert model_type == "gemma3_text" or [norms_formed(graph) > 0 for graph in layers] == [not is_passed] * 2
        # What follows Gemma's attention and MLP is a norm, not a sum.
        assert sums(recorder.forward) == [is_passed and model_type != "gemma3_text"] * 4
    assert far(after, wanted) <= max(1.2 * far(before, wanted), 1e-5)


def test_checkpointed_layers_leave_out_their_end(tmp_path):
    model = make("llama", tmp_path, torch.bfloat16)
    wanted = gradients(copy.deepcopy(model).double())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before, plain = compiled_gradients(model)
    after, passed = compiled_gradients(model, LORA_GRAPH)
    assert sums(passed.forward) == [True] * 2
    assert sums(passed.backward) == [True], "that of the attention runs again, and that of the MLP does not"
    # The norms are formed again for what runs again.
    assert scaled(passed.backward) == [False] * 3
    assert [len(graph.graph.nodes) for graph in passed.backward] == [len(graph.graph.nodes) for graph in plain.backward]
    assert far(after, wanted) <= 1.2 * far(before, wanted)


def test_what_is_kept_for_backward_stays(tmp_path):
    model = make("llama", tmp_path, torch.bfloat16)

    def kept(joint_pass) -> list[int]:
        _, recorder = compiled_gradients(model, joint_pass)
        outputs = [graph.graph.output_node().args[0] for graph in recorder.forward]
        return [sum(arg.meta["val"].nbytes for arg in args if isinstance(arg, fx.Node)) for args in outputs]

    # A layer whose input takes no gradient kept the norm's output, and keeps its input and what that was scaled by.
    assert all(after <= 1.01 * before for after, before in zip(kept(LORA_GRAPH), kept(None), strict=True))


# --- shapes of graphs -----------------------------------------------------------------------------------------------------

SIZE = 16


def make_projection(inputs: int, outputs: int, dtype: torch.dtype):
    weight, A, B = (torch.randn(*shape) * 0.3 for shape in ((outputs, inputs), (4, inputs), (outputs, 4)))
    return weight.to(dtype), None, None, A.requires_grad_(), B.requires_grad_(), 2.0


def norm(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = h.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


class Layer(torch.nn.Module):
    """A norm with two projections and an MLP of its output, for functions of these."""

    def __init__(self, function: Callable[..., Any], dtype: torch.dtype, weight_dtype: torch.dtype):
        super().__init__()
        self.function = function
        self.weight = (torch.rand(SIZE) + 0.5).to(weight_dtype)
        self.projections = [make_projection(SIZE, SIZE, dtype) for _ in range(2)]
        self.parts = [make_projection(*sizes, dtype) for sizes in ((SIZE, 24), (SIZE, 24), (24, SIZE))]

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        groups = {"": self.projections, "mlp": self.parts}
        return {
            f"{name}{at}{factor}": projection[3 + factor]
            for name, group in groups.items()
            for at, projection in enumerate(group)
            for factor in range(2)
        }

    def norm(self, h: torch.Tensor) -> torch.Tensor:
        return norm(h, self.weight)

    def project(self, x: torch.Tensor, at: int = 0) -> torch.Tensor:
        return project_in_graph(x, self.projections[at : at + 1])[0]

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return mlp_in_graph(x, self.parts, "silu")

    def forward(self, h: torch.Tensor) -> Any:
        return self.function(self, h)


def run(
    function: Callable[..., Any],
    dtype: torch.dtype = torch.float32,
    *,
    weight_dtype: torch.dtype | None = None,
    hidden_dtype: torch.dtype | None = None,
    shape: tuple[int, ...] = (2, 6, SIZE),
    any_length: bool = False,
) -> GraphRecorder:
    """Compile a function of a layer and its input, see that the gradients are right, and return the graphs."""
    torch.manual_seed(0)
    layer = Layer(function, dtype, weight_dtype or dtype)
    h = torch.randn(shape).to(hidden_dtype or dtype).requires_grad_()
    if any_length:
        torch._dynamo.mark_dynamic(h, 1)
    recorder = GraphRecorder(LORA_GRAPH)
    compiled = torch.compile(layer, backend=recorder, fullgraph=True)
    grads = []
    for forward in (compiled, layer):
        with torch.autocast("cpu", torch.bfloat16, enabled=(hidden_dtype or weight_dtype or dtype) != dtype):
            outputs = forward(h)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves, generator = {"h": h, **layer.factors}, torch.Generator().manual_seed(0)
        upstream = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
        got = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
        grads.append({name: grad.double() for name, grad in zip(leaves, got, strict=True) if grad is not None})
    assert far(*grads) < (1e-5 if dtype == torch.float32 else 0.02)
    return recorder


READ = {
    "one": (lambda layer, h: layer.project(layer.norm(h)), {}),
    "two": (lambda layer, h: layer.project(x := layer.norm(h)) * layer.project(x, 1), {}),
    "a forward that is not read": (lambda layer, h: layer.project(x := layer.norm(h)) + x.mean(), {}),
    "rows": (lambda layer, h: layer.project(layer.norm(h)), {"shape": (7, SIZE)}),
    "bf16": (lambda layer, h: layer.project(layer.norm(h)), {"dtype": torch.bfloat16}),
    "fp32 weight of the norm": (
        lambda layer, h: layer.project(layer.norm(h)),
        {"dtype": torch.bfloat16, "weight_dtype": torch.float32},
    ),
    "any length": (lambda layer, h: layer.project(layer.norm(h)), {"any_length": True}),
}


@pytest.mark.parametrize("case", READ)
def test_norms_that_are_not_formed_again(case):
    function, options = READ[case]
    recorder = run(function, **options)
    assert scaled(recorder.backward) == [True] * (2 if case == "two" else 1)
    assert norms_formed(recorder.backward[0]) == 0


FORMED = {
    "needed by another gradient": (lambda layer, h: layer.project(x := layer.norm(h)) + torch.sin(x), {}),
    "needed by another weight": (
        lambda layer, h: layer.project(x := layer.norm(h)) + x @ layer.factors["00"].T @ layer.factors["01"].T,
        {},
    ),
    "one of the outputs": (lambda layer, h: (layer.project(x := layer.norm(h)), x), {}),
    "no norm": (lambda layer, h: layer.project(torch.sin(h)), {}),
    "no weight": (lambda layer, h: layer.project(norm(h, torch.ones(()))), {}),
    "scales for each element": (lambda layer, h: layer.project(layer.weight * (h * torch.sigmoid(h.float()))), {}),
    "other rows": (lambda layer, h: layer.project(layer.norm(h).transpose(0, 1)), {}),
    "rows that are apart": (lambda layer, h: layer.project(layer.norm(h[..., :SIZE])), {"shape": (2, 6, 2 * SIZE)}),
    "fp16": (lambda layer, h: layer.project(layer.norm(h)), {"dtype": torch.float16}),
    "an fp32 input": (
        lambda layer, h: layer.project(layer.norm(h)),
        {"dtype": torch.bfloat16, "weight_dtype": torch.float32, "hidden_dtype": torch.float32},
    ),
}


@pytest.mark.parametrize("case", FORMED)
def test_norms_that_are_left_alone(case):
    function, options = FORMED[case]
    assert scaled(run(function, **options).backward) == [False]


ADDED = {
    "residual first": (lambda layer, h: h + layer.mlp(torch.sin(h)), {}),
    "residual last": (lambda layer, h: layer.mlp(layer.norm(h)) + h, {}),
    "rows": (lambda layer, h: h + layer.mlp(layer.norm(h)), {"shape": (7, SIZE)}),
    "bf16": (lambda layer, h: h + layer.mlp(layer.norm(h)), {"dtype": torch.bfloat16}),
    "any length": (lambda layer, h: h + layer.mlp(layer.norm(h)), {"any_length": True}),
    "twice": (lambda layer, h: (y := h + layer.project(h)) + layer.mlp(y), {}),
    "a projection": (lambda layer, h: h + layer.project(layer.norm(h)), {}),
    "a projection that two read": (lambda layer, h: (y := h + layer.project(h)) * layer.norm(y), {}),
}


@pytest.mark.parametrize("case", ADDED)
def test_residuals_that_the_operator_adds(case):
    function, options = ADDED[case]
    recorder = run(function, **options)
    assert sums(recorder.forward) == [True] * (2 if case == "twice" else 1)
    assert not calls(recorder.forward[0], torch.ops.aten.add.Tensor) or "norm" in function.__code__.co_names


NOT_ADDED = {
    "nothing to add": (lambda layer, h: layer.mlp(h), {}),
    "itself": (lambda layer, h: (y := layer.mlp(h)) + y, {}),
    "other uses": (lambda layer, h: (h + (y := layer.mlp(h))) * y, {}),
    "one row": (lambda layer, h: h[:1, :1] + layer.mlp(h), {}),
    "a number": (lambda layer, h: layer.mlp(h) + 1.0, {}),
    "a share": (lambda layer, h: torch.add(h, layer.mlp(h), alpha=0.5), {}),
    "what comes later": (lambda layer, h: layer.mlp(h) + torch.sin(h), {}),
    "rows that are apart": (
        lambda layer, h: h[..., SIZE:] + layer.mlp(h[..., :SIZE].contiguous()),
        {"shape": (2, 6, 2 * SIZE)},
    ),
    "another dtype": (
        lambda layer, h: h + layer.mlp(h),
        {"dtype": torch.bfloat16, "hidden_dtype": torch.float32},
    ),
}


@pytest.mark.parametrize("case", NOT_ADDED)
def test_sums_that_are_left_alone(case):
    function, options = NOT_ADDED[case]
    assert sums(run(function, **options).forward) == [False]


# --- inductor -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor_runs_the_pass_and_caches_what_it_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    seen, scale, add = [], lora_ops.scale_rows, lora_ops.add_low_rank
    monkeypatch.setattr(lora_ops, "scale_rows", lambda *args: seen.append("scale") or scale(*args))
    monkeypatch.setattr(lora_ops, "add_low_rank", lambda *args: seen.append("sum") or add(*args))
    torch.manual_seed(0)
    layer = Layer(lambda layer, h: h + layer.mlp(layer.norm(h)), torch.bfloat16, torch.bfloat16)
    h = torch.randn(2, 6, SIZE).bfloat16()
    factors = [factor for name, factor in layer.factors.items() if "mlp" in name]
    wanted = torch.autograd.grad(layer(h).sum(), factors)
    for hits in (0, 2):
        torch._dynamo.reset()
        counters.clear()
        seen.clear()
        y = torch.compile(layer, fullgraph=True, **_default_options())(h)
        for got, other in zip(torch.autograd.grad(y.sum(), factors), wanted, strict=True):
            torch.testing.assert_close(got, other, rtol=0.03, atol=0.03 * float(other.abs().max()))
        assert seen == ["sum", "scale"]
        assert counters["inductor"]["fxgraph_cache_hit"] == hits
