"""CUDA graphs of compiled decoder layers: where a GPU is faster than Python can launch its kernels.

A micro-batch of a 1B model is some two thousand kernels, and launching them takes as long as running them. `LayerGraphs`
records the forward and the backward of every layer once per shape of the batch and from then on launches two graphs a layer.
What lies between the layers and around them (embeddings, hooks, the head and its loss, the accumulation of gradients) is
not recorded. The kernels, their order and their results are those of the layers themselves.

A graph reads and writes fixed memory. Layer i + 1 is recorded upon the output of layer i, so that nothing is copied between
them. All graphs share one pool, in which the layers' activations lie as they would without graphs: that needs the graphs of a
pass to run in the order in which they were recorded, and a pass to end before the next one begins.

Source: "CUDA Graphs" in the CUDA C++ programming guide; `torch.cuda.make_graphed_callables` does the same for modules that are
not compiled, whose gradients are not accumulated and whose inputs all have their own copy.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PretrainedConfig

from axolotl.exceptions import ConfigError, first_line
from axolotl.monkeypatch.compile_layers import CompiledForward, runs_compiled
from axolotl.monkeypatch.lora_kernels import get_layers
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

WARM_UP = 3
"""Passes of one shape before it is recorded: the first ones compile, choose algorithms and load kernels."""

MAX_SHAPES = 4
"""Shapes that are recorded, the common ones. Each keeps the inputs of all layers and their gradients; others run without graphs."""

MIN_DOCUMENTS = 64
MIN_LONGEST = 512
"""Documents of a batch, and tokens of the longest one, are rounded up to these times a power of two: see `round_up_borders`."""

MAX_HIDDEN_SIZE = 2560
"""Above, kernels take longer than their launches, and graphs bring nothing for the memory that they keep."""

_PLAIN = (bool, int, float, str, torch.dtype)

Layer = Callable[..., torch.Tensor]


def round_up_borders(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a layer with borders of documents such that few shapes serve all packed batches.

    Borders are filled up with empty documents at the end, and the longest document counts as longer than it is, which only
    says how far a varlen kernel looks.

    Args:
        kwargs: may have `cu_seq_lens_q`, `cu_seq_lens_k`, int32 (number of documents + 1,), and `max_length_q`, `max_length_k`.
    """
    rounded = dict(kwargs)
    done: dict[int, torch.Tensor] = {}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        borders = kwargs.get(name)
        if isinstance(borders, torch.Tensor):
            # A value for both names stays one tensor.
            if id(borders) not in done:
                missing = _round_up(borders.numel() - 1, MIN_DOCUMENTS) + 1 - borders.numel()
                last = borders[-1:].expand(missing)
                done[id(borders)] = torch.cat([borders, last]) if missing else borders
            rounded[name] = done[id(borders)]
    for name in ("max_length_q", "max_length_k"):
        if isinstance(kwargs.get(name), int):
            rounded[name] = _round_up(kwargs[name], MIN_LONGEST)
    return rounded


def _round_up(number: int, least: int) -> int:
    return least * (1 << (max(0, -(-number // least) - 1)).bit_length())


class _Pass:
    """One forward through all layers; alive as long as what autograd keeps of it."""

    def __init__(self, *, replayed: bool):
        self.may_go_back = replayed

    def hold(self, grad: torch.Tensor) -> None:
        """A hook that does nothing: autograd keeps it, and this object with it."""


@dataclass
class _LayerGraph:
    """Both graphs of one layer, and the memory that they read and write."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    hidden: torch.Tensor
    output: torch.Tensor
    grad_output: torch.Tensor
    grad_hidden: torch.Tensor | None
    grad_parameters: torch.Tensor  # all in a row
    parameters: list[nn.Parameter]


@dataclass
class _Recording:
    """All layers for one shape."""

    keywords: list[torch.Tensor]  # the tensors in the keywords of the layers
    layers: list[_LayerGraph] = field(default_factory=list)


class _Replay(torch.autograd.Function):
    """One layer. The gradients of its parameters are accumulated by autograd like any others."""

    @staticmethod
    def forward(
        ctx: Any, graph: _LayerGraph, run: _Pass, is_first: bool, hidden: torch.Tensor, *parameters: nn.Parameter
    ) -> torch.Tensor:
        if hidden.data_ptr() != graph.hidden.data_ptr():
            graph.hidden.copy_(hidden)
        graph.forward.replay()
        ctx.graph, ctx.run, ctx.is_first = graph, run, is_first
        return graph.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        graph = ctx.graph
        if grad_output.data_ptr() != graph.grad_output.data_ptr():
            graph.grad_output.copy_(grad_output)
        graph.backward.replay()
        ctx.run.may_go_back = not ctx.is_first
        grad_hidden = None if graph.grad_hidden is None else graph.grad_hidden.detach()
        # The next replay writes over its memory, and a gradient stays: a copy.
        flat = graph.grad_parameters.clone()
        parts = flat.split([parameter.numel() for parameter in graph.parameters])
        grads = [part.view(parameter.shape) for part, parameter in zip(parts, graph.parameters, strict=True)]
        return None, None, None, grad_hidden, *grads


class LayerGraphs:
    """Runs the layers of one model, recorded where that is possible.

    Every layer of a pass must get the same keywords. A pass that began while another could still go backward runs without graphs.

    Args:
        layers: the modules, in the order in which the model calls them.
    """

    def __init__(self, layers: list[nn.Module]):
        self.failed: str | None = None
        self._count = len(layers)
        self._parameters = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
        self._seen: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, _Recording] = {}
        self._calls: dict[int, Layer] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._bytes = 0  # that the graphs hold
        self._previous: weakref.ref[_Pass] | None = None
        # Of the pass under way: what its layers got, what stands for it, and the recording that runs it.
        self._given: dict[str, Any] = {}
        self._kwargs: dict[str, Any] = {}
        self._recording: _Recording | None = None
        self._pass: _Pass | None = None

    @property
    def num_shapes(self) -> int:
        """Shapes recorded so far."""
        return len(self._recordings)

    def run(self, index: int, layer: Layer, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The output of layer `index`.

        Args:
            index: which layer.
            layer: computes it.
            hidden: (B, T, H).
            kwargs: its keywords.
        """
        if index == 0:
            self._pass = None  # of a forward that did not reach the last layer
            self._given = kwargs
            self._kwargs = kwargs if self.failed is not None else round_up_borders(kwargs)
            self._recording = self._find_recording(hidden)
            self._pass = _Pass(replayed=self._recording is not None)
            self._previous = weakref.ref(self._pass)
        elif not _same(kwargs, self._given):
            return layer(hidden, **kwargs)
        self._calls[index] = layer
        assert self._pass is not None
        if self._recording is None:
            output = layer(hidden, **self._kwargs)
        else:
            graph = self._recording.layers[index]
            output = _Replay.apply(graph, self._pass, index == 0, hidden, *graph.parameters)
        if index == self._count - 1:
            if self._recording is None and isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(self._pass.hold)
            self._pass = None
        return output

    def _find_recording(self, hidden: torch.Tensor) -> _Recording | None:
        """What runs the pass that begins; records it if its time has come."""
        previous = self._previous() if self._previous is not None else None
        if self.failed is not None or (previous is not None and previous.may_go_back):
            return None
        leaves, structure = tree_flatten(self._kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        others = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        if not all(leaf is None or isinstance(leaf, _PLAIN) for leaf in others):
            return None  # an object may hold tensors of its own, such as the mask of flex attention
        shapes = tuple((t.shape, t.stride(), t.dtype) for t in (hidden, *tensors))
        key = (shapes, others, str(structure), hidden.requires_grad)
        recording = self._recordings.get(key)
        if recording is None:
            self._seen[key] += 1
            count = self._seen[key]
            # Of rows of every length some meet by chance: a shape has to be common.
            is_known = count > WARM_UP and count * MAX_SHAPES >= self._seen.total() and len(self._calls) == self._count
            # What autograd keeps of a pass before ties the parameters to the stream that it ran on.
            can_record = is_known and previous is None and len(self._recordings) < MAX_SHAPES
            recording = self._record(hidden) if can_record else None
            if recording is None:
                if self._is_tight():
                    self._give_up("batches of other shapes need their memory")
                return None
            self._recordings[key] = recording
        else:
            for mine, given in zip(recording.keywords, tensors, strict=True):
                mine.copy_(given)
        return recording

    def _record(self, hidden: torch.Tensor) -> _Recording | None:
        """Record all layers, or say why not and never try again."""
        leaves, structure = tree_flatten(self._kwargs)
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        kwargs = tree_unflatten(leaves, structure)
        recording = _Recording([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        # What the allocator keeps for passes without graphs makes room for the pool.
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved()
        torch.clear_autocast_cache()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._record_layers(hidden.detach().clone().requires_grad_(hidden.requires_grad), kwargs, recording)
        except RuntimeError as error:
            self._give_up(first_line(error))
            return None
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            torch.clear_autocast_cache()
        self._bytes += torch.cuda.memory_reserved() - reserved
        return recording

    def make_room(self) -> None:
        """For an evaluation, which may need the memory that the graphs hold. Where there is not twice as much, they are
        forgotten, and recorded anew when training goes on."""
        if self._is_tight():
            self._forget()

    def _is_tight(self) -> bool:
        return bool(self._recordings) and torch.cuda.mem_get_info()[0] < self._bytes

    def _forget(self) -> None:
        self._recordings.clear()
        self._recording = None
        self._bytes = 0
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    def _give_up(self, reason: str) -> None:
        self.failed = reason
        self._forget()
        LOG.warning(f"The layers run without CUDA graphs: {reason}.")

    def _record_layers(self, hidden: torch.Tensor, kwargs: dict[str, Any], recording: _Recording) -> None:
        if any(len({parameter.dtype for parameter in parameters}) > 1 for parameters in self._parameters):
            raise RuntimeError("the trained weights of a layer have several dtypes")
        recorded = []
        for index in range(self._count):
            graph = torch.cuda.CUDAGraph()
            with _Capture(graph, self._pool):
                output = self._calls[index](hidden, **kwargs)
            if not isinstance(output, torch.Tensor):
                raise RuntimeError(f"a layer returns a {type(output).__name__}")
            recorded.append((graph, hidden, output))
            hidden = output.detach().requires_grad_()
        grad_output = torch.empty_like(output)
        while recorded:
            forward, hidden, output = recorded.pop()
            parameters = self._parameters[len(recorded)]
            graph = torch.cuda.CUDAGraph()
            with _Capture(graph, self._pool):
                wanted = [hidden, *parameters] if hidden.requires_grad else parameters
                grads = list(torch.autograd.grad(output, wanted, grad_output))
                grad_hidden = grads.pop(0) if hidden.requires_grad else None
                flat = torch.cat([grad.reshape(-1) for grad in grads]) if grads else output.new_empty(0)
                del grads
            recording.layers.insert(
                0,
                _LayerGraph(
                    forward, graph, hidden.detach(), output.detach(), grad_output, grad_hidden, flat, parameters
                ),
            )
            del output
            if grad_hidden is not None:
                grad_output = grad_hidden


class _Capture:
    """Record what the current stream is given. Unlike `torch.cuda.graph`, collects no garbage for every graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: Any):
        self._graph = graph
        self._pool = pool

    def __enter__(self) -> None:
        # Other threads, such as the one that pins batches, may go on allocating.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self._graph.capture_end()
            return
        # Where recording failed, ending it fails too, and leaves the random generator thinking that it is recorded.
        with contextlib.suppress(RuntimeError):
            self._graph.capture_end()
        something = torch.cuda.CUDAGraph()
        something.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device="cuda")
        something.capture_end()


def _same(kwargs: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether two layers got the same objects; of tuples, the same in them."""
    if kwargs.keys() != others.keys():
        return False
    return all(
        one is other or (isinstance(one, tuple) and isinstance(other, tuple) and all(map(_is, one, other)))
        for one, other in ((kwargs[name], others[name]) for name in kwargs)
    )


def _is(one: Any, other: Any) -> bool:
    return one is other


def graph_layers(model: nn.Module) -> LayerGraphs:
    """Let the compiled layers of a model be recorded. See `compile_layers`, which comes first.

    Args:
        model: a model of transformers, or a peft model around one.

    Returns:
        What records and runs them.
    """
    layers = get_layers(model)
    graphs = LayerGraphs(layers)
    for index, layer in enumerate(layers):
        forward = layer.__dict__["forward"]
        assert isinstance(forward, CompiledForward)
        forward.graphs = (graphs, index)
    return graphs


def why_no_graphs(
    cfg: DictDefault, model: nn.Module, *, has_gpu: bool, num_processes: int, by_default: bool = True
) -> str | None:
    """Why the layers of a run are not recorded, or None.

    Args:
        cfg: the config of the run.
        model: the model, with its adapter.
        has_gpu: whether it runs on CUDA.
        num_processes: of the run.
        by_default: also ask whether graphs are known to pay.
    """
    config: PretrainedConfig = model.config  # type: ignore[assignment] - `nn.Module` declares no attributes of subclasses
    compiled = runs_compiled(cfg, config, has_gpu=has_gpu)
    can = (
        (not has_gpu, "no GPU"),
        (num_processes > 1, "not tested with several processes"),
        (not compiled, "the layers are not compiled"),
        (bool(cfg.torch_compile_mode or cfg.torch_compile_options), "layers compiled in a way of their own"),
        (bool(cfg.activation_offloading), "graphs write to the same memory in every step, with no regard to copies out of it"),
        (bool(cfg.selective_checkpointing), "another kind of checkpointing"),
        *((bool(cfg[key]), f"not tested with `{key}`") for key in ("layer_offloading", "tiled_mlp", "relora", "lisa_n_layers")),
        # A resumed run draws other numbers in its first steps, which run without graphs.
        (any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()), "dropout"),
    )  # fmt: skip
    pays = (
        (not cfg.adapter, "the gradients of all weights would be copied"),
        (config.get_text_config().hidden_size > MAX_HIDDEN_SIZE, "kernels take longer than their launches"),
    )
    return next((reason for holds, reason in (*can, *(pays if by_default else ())) if holds), None)


def records_layers(cfg: DictDefault, model: nn.Module, *, has_gpu: bool, num_processes: int) -> bool:
    """Whether `apply_cuda_graphs` will record the layers of this run. Arguments as of `why_no_graphs`."""
    if cfg.cuda_graphs is not None:
        return bool(cfg.cuda_graphs)
    return why_no_graphs(cfg, model, has_gpu=has_gpu, num_processes=num_processes) is None


def apply_cuda_graphs(cfg: DictDefault, model: nn.Module, *, has_gpu: bool, num_processes: int) -> None:
    """Record the layers if `cuda_graphs` says so or, where it says nothing, if that is known to pay.

    Raises:
        ConfigError: `cuda_graphs: true` where the layers cannot be recorded.
    """
    machine = {"has_gpu": has_gpu, "num_processes": num_processes}
    reason = why_no_graphs(cfg, model, by_default=cfg.cuda_graphs is None, **machine)
    if reason is not None:
        if cfg.cuda_graphs:
            raise ConfigError(f"`cuda_graphs: true`: the layers cannot be recorded: {reason}. Remove the key.")
        return
    graph_layers(model)
    if cfg.cuda_graphs is None:
        note_choice(cfg, "cuda_graphs", True, "launching the kernels of these layers takes longer than running them")
