"""`torch.compile` for the decoder layers of a model, one by one.

All layers of a kind share one compiled function, so that compiling takes seconds where compiling a whole model takes minutes,
and nothing between the layers (hooks, caches, the loss) is traced. Only passes that learn are compiled; generation and
evaluation, whose shapes change with every batch, run as they are. The first shape is compiled as it is, and when another
comes, once more for all shapes.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from axolotl.exceptions import first_line
from axolotl.kernels.lora_graph import LORA_GRAPH
from axolotl.kernels.lora_ops import RECOMPUTED
from axolotl.loaders.utils import plain_model
from axolotl.monkeypatch.attention.documents import mark_used
from axolotl.monkeypatch.gradient_checkpointing.install import Offloaded, OffloadedCheckpoint, Store, weight_storages
from axolotl.monkeypatch.lora_kernels import get_layers
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.validation.common import LORA_KERNELS

LOG = get_logger(__name__)

RECOMPILE_LIMIT = 64
"""Versions of a layer's code; PyTorch's 8 do not reach for models whose layers differ (sliding windows, shared keys)."""

# Architectures whose layers are compiled when nothing is said: those that the tests compile without a break in the graph.
COMPILED_BY_DEFAULT = frozenset({"llama", "mistral", "qwen2", "qwen3"})

MIN_STEPS = 20
"""A run of fewer steps ends before compiling has paid."""


def _is_plain_checkpoint(function: Any) -> bool:
    """Whether a checkpoint function is PyTorch's own, without re-entry."""
    plain = isinstance(function, functools.partial) and function.func is checkpoint
    return plain and function.keywords.get("use_reentrant") is False


class Recorder(Protocol):
    """Records what the compiled layers of one model launch, and replays it: `axolotl.monkeypatch.layer_graphs.LayerGraphs`."""

    def run(self, index: int, layer: Callable[..., Any], hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The output of layer `index`, which `layer` computes from `hidden`, (B, T, H), and keywords."""
        ...

    def make_room(self) -> None:
        """Called before a pass that is not recorded and may need the memory."""
        ...


class CompiledForward:
    """The forward of one layer: compiled where a gradient will be taken, else as it was.

    Gradient checkpointing without re-entry happens inside what is compiled: the compiler leaves out of the second forward what
    backward does not need, such as the last matmul. transformers checkpoints in the layer's forward, before 5.20 in its call.

    Attributes:
        plain: the layer's own forward.
        may_fall_back: whether a layer that cannot be compiled runs as it was, after a warning, instead of raising.
        graphs: record and replay what is compiled, with the number of this layer among theirs; None for launching it each time.
    """

    def __init__(self, layer: nn.Module, options: dict[str, Any], *, may_fall_back: bool):
        self.plain: Callable[..., Any] = layer.forward
        self.may_fall_back = may_fall_back
        self.graphs: tuple[Recorder, int] | None = None
        self._layer: Any = layer
        self._failed = False
        own: Any = type(layer).forward
        self._checkpoints = isinstance(layer, GradientCheckpointingLayer) and "__call__" not in vars(
            GradientCheckpointingLayer
        )
        # Below transformers' wrapper that checkpoints.
        raw = types.MethodType(own.__wrapped__, layer) if self._checkpoints else self.plain
        self._raw: Callable[..., Any] = raw
        self._compiled = torch.compile(raw, **options)

        def recomputed(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(raw, *args, use_reentrant=False, **kwargs)

        self._compiled_recomputed = torch.compile(recomputed, **options)
        functools.update_wrapper(self, self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer
        if not (self._checkpoints and layer.gradient_checkpointing and layer.training):
            return self._run_once(*args, **kwargs)
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            return self.plain(*args, **kwargs)  # transformers takes them away, and says so
        function = layer._gradient_checkpointing_func
        if isinstance(function, OffloadedCheckpoint) and _is_plain_checkpoint(function.function):
            with Offloaded(function.store, weight_storages(layer)):
                return self._run_recomputed(self.plain, args, kwargs)
        if _is_plain_checkpoint(function):
            return self._run_recomputed(self.plain, args, kwargs)
        return function(functools.partial(self._run_once, **kwargs), *args)

    def recomputed(self, function: Callable[..., Any], *args: Any, store: Store | None = None) -> Any:
        """The layer with checkpointing inside what is compiled, as the checkpoint function of transformers before 5.20.

        Args:
            function: the layer's call with its keywords bound.
            *args: the other arguments of the layer.
            store: where its input waits.
        """
        plain = functools.partial(checkpoint, function, use_reentrant=False)
        watched = self._layer._forward_hooks or self._layer._forward_pre_hooks or self._layer._backward_hooks
        with Offloaded(store, weight_storages(self._layer)) if store is not None else contextlib.nullcontext():
            if watched or not isinstance(function, functools.partial):
                return plain(*args)
            return self._run_recomputed(lambda *args, **_: plain(*args), args, function.keywords)

    def _run_once(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._compiled, self._raw, args, kwargs)

    def _run_recomputed(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        token = RECOMPUTED.set(True)
        try:
            return self._run(self._compiled_recomputed, plain, args, kwargs)
        finally:
            RECOMPUTED.reset(token)

    def _run(
        self, compiled: Callable[..., Any], plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._failed or not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
            if self.graphs is not None and self.graphs[1] == 0:
                self.graphs[0].make_room()
            return plain(*args, **kwargs)
        if kwargs.get("cu_seq_lens_q") is not None:
            mark_used()  # The attention inside the graph cannot.
        if self.graphs is not None and len(args) == 1:
            graphs, index = self.graphs
            compiled = functools.partial(graphs.run, index, compiled)
            args, kwargs = (*args, kwargs), {}
        if not self.may_fall_back:
            return compiled(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            LOG.warning_once(
                f"The layers could not be compiled and run as they are: {first_line(error)} "
                "Write `torch_compile: false` to skip the attempt."
            )
            self._failed = True
            return plain(*args, **kwargs)


def compile_layers(
    model: nn.Module, options: dict[str, Any] | None = None, *, may_fall_back: bool = False
) -> list[nn.Module]:
    """Compile the forward of every decoder layer and of the norm after the last, at its first use.

    Args:
        model: a model of transformers, or a peft model around one. Changed in place: their `forward`, on the instance.
        options: keyword arguments of `torch.compile`, in place of those chosen here.
        may_fall_back: see `CompiledForward`.

    Returns:
        The layers.
    """
    # Backward forms the inputs of matmuls again from what it has anyway (a norm, an activation) instead of keeping them: on an
    # H200 a third of a percent of the speed for a tenth to a fifth of the memory.
    torch._functorch.config.ban_recompute_materialized_backward = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    layers = get_layers(model)
    for module in (*layers, *_final_norms(model)):
        if not isinstance(module.__dict__.get("forward"), CompiledForward):
            module.forward = CompiledForward(module, options or _default_options(), may_fall_back=may_fall_back)
    base = plain_model(model)
    method = base._set_gradient_checkpointing
    if "__call__" in vars(GradientCheckpointingLayer) and not _is_switch(method):
        base._set_gradient_checkpointing = functools.partial(_switch_checkpointing, base, method)
    return layers


def _default_options() -> dict[str, Any]:
    """For inductor. On CUDA small kernels that do not depend on each other, such as the casts of adapters, run as one."""
    options: dict[str, Any] = {"joint_custom_pre_pass": LORA_GRAPH}
    return {"options": {**options, "combo_kernels": True} if torch.cuda.is_available() else options}


def _final_norms(model: nn.Module) -> list[nn.Module]:
    """The norm that follows the last layer, which no layer's graph can hold; run as it is, it is a dozen passes over the states."""
    layers = set(get_layers(model))
    decoders = [
        module for module in model.modules() if any(layers & set(child.children()) for child in module.children())
    ]
    return [child for decoder in decoders for child in decoder.children() if type(child).__name__.endswith("RMSNorm")]


def _is_switch(method: Any) -> bool:
    return isinstance(method, functools.partial) and method.func is _switch_checkpointing


def _switch_checkpointing(model: nn.Module, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """transformers' method, then: a compiled layer that would be checkpointed without re-entry does it inside its graph."""
    original(*args, **kwargs)
    for layer in get_layers(model):
        forward = layer.__dict__.get("forward")
        function, store = layer._gradient_checkpointing_func, None
        if isinstance(function, OffloadedCheckpoint):
            function, store = function.function, function.store
        if isinstance(forward, CompiledForward) and _is_plain_checkpoint(function):
            layer._gradient_checkpointing_func = functools.partial(forward.recomputed, store=store)


def uncompile_layers(model: nn.Module) -> None:
    """Undo `compile_layers`."""
    for module in (*get_layers(model), *_final_norms(model)):
        if isinstance(module.__dict__.get("forward"), CompiledForward):
            del module.forward
    base = plain_model(model)
    method = vars(base).get("_set_gradient_checkpointing")
    if _is_switch(method):
        base._set_gradient_checkpointing = method.args[1]


def why_not_by_default(cfg: DictDefault, config: PretrainedConfig, *, has_gpu: bool) -> str | None:
    """Why a config that does not say `torch_compile` runs without, or None when compiling pays and is known to be right.

    Args:
        cfg: the config of the run.
        config: the model's.
        has_gpu: whether it will run on CUDA.
    """
    rules = (
        (not has_gpu, "no GPU"),
        (config.model_type not in COMPILED_BY_DEFAULT, f"not tested for `{config.model_type}`"),
        (bool(cfg.max_steps) and int(cfg.max_steps or 0) < MIN_STEPS, f"fewer than {MIN_STEPS} steps"),
        (bool(cfg.load_in_8bit), "8-bit layers cannot be traced"),
        (
            bool(cfg.load_in_4bit) and (bool(cfg.lora_dropout) or not all(cfg[key] for key in LORA_KERNELS[:3])),
            "4-bit layers are tested below the LoRA kernels only",
        ),
        (bool(cfg.adapter) and cfg.adapter not in ("lora", "qlora"), f"not tested with `adapter: {cfg.adapter}`"),
        (cfg.activation_offloading in ("legacy", "disk"), f"not tested with `activation_offloading: {cfg.activation_offloading}`"),
        *(
            (bool(cfg[key]), f"not tested with `{key}`")
            for key in ("layer_offloading", "tiled_mlp", "relora", "lisa_n_layers", "qat",
                        "peft_use_dora", "fsdp_config", "deepspeed", "trust_remote_code")
        ),
    )  # fmt: skip
    return next((reason for holds, reason in rules if holds), None)


def runs_compiled(cfg: DictDefault, config: PretrainedConfig, *, has_gpu: bool) -> bool:
    """Whether `apply_torch_compile` will compile the layers of this run. Arguments as of `why_not_by_default`."""
    if cfg.torch_compile is not None:
        return bool(cfg.torch_compile)
    return why_not_by_default(cfg, config, has_gpu=has_gpu) is None


def apply_torch_compile(cfg: DictDefault, model: nn.Module) -> None:
    """Compile the layers if `torch_compile` says so or, where it says nothing, if that is known to pay.

    Reads `torch_compile`, `torch_compile_backend`, `torch_compile_mode` and `torch_compile_options`.
    """
    config: Any = model.config
    if not runs_compiled(cfg, config, has_gpu=torch.cuda.is_available()):
        return
    asked = bool(cfg.torch_compile)
    options = {
        name: value.to_dict() if isinstance(value, DictDefault) else value
        for name, value in (
            ("backend", cfg.torch_compile_backend),
            ("mode", cfg.torch_compile_mode),
            ("options", cfg.torch_compile_options),
        )
        if value
    }
    layers = compile_layers(model, options, may_fall_back=not asked)
    if not asked:
        note_choice(
            cfg, "torch_compile", True, f"each of the {len(layers)} layers runs faster; the first step waits for it"
        )
