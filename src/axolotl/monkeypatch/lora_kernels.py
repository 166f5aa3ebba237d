"""Puts the LoRA functions of `axolotl.kernels.lora` into a model that has an adapter.

No source is rewritten. An MLP becomes an instance of a subclass with another `forward`. So does an attention; its own
`forward` still runs, but sees projections that ask `apply_qkv` and `apply_o`: whichever of q, k and v it calls first computes
all three, and the other two are handed out when it calls them with the same input. In compiled layers queries and keys come
rotated, where `lora_rotary` finds that the forward rotates them next. Nothing is set on instances, so that `torch.compile` sees
the same code in every layer and compiles it once. `remove_lora_kernel_patches` undoes all of it.

A layer that the functions do not fit stays as it is, and the reason is noted; what can change later (dropout in training
mode, several active adapters, hooks, trained base weights) is asked at every forward.
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig
from transformers.activations import ACT2FN

from axolotl.exceptions import ModelError
from axolotl.kernels.frozen_weights import lay_in_a_row, round_up_rank
from axolotl.kernels.lora import (
    apply_lora_embedding,
    apply_lora_mlp_geglu,
    apply_lora_mlp_swiglu,
    apply_lora_o,
    apply_lora_qkv,
    apply_lora_qkv_rotated,
    why_not_fused,
)
from axolotl.loaders.utils import plain_model
from axolotl.model_support import read_model_support
from axolotl.monkeypatch.lora_rotary import Rotation, find_rotation
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.validation.common import LORA_KERNELS

LOG = get_logger(__name__)

QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

# By the class that transformers builds for each name of an activation.
_SILU = {type(ACT2FN[name]) for name in ("silu", "swish")}
_GELU = {type(ACT2FN["gelu"])}
_GELU_TANH = {type(ACT2FN[name]) for name in ("gelu_pytorch_tanh", "gelu_new")}

# An MLP that computes something else differs by far more; rounding in bf16 by less.
_TOLERANCE = 0.02


class FakeMLP(nn.Module):
    """Three projections under the names that `apply_lora_mlp_swiglu` reads, for models that keep them elsewhere."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module):
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return apply_lora_mlp_swiglu(self, X)


def original_apply_qkv(self: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value through their modules."""
    return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)


def original_apply_o(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The output projection through its module."""
    return self.o_proj(hidden_states)


# --- attention classes ------------------------------------------------------------------------------------------------


class _Projection:
    """One of q, k, v and o inside an attention's forward: computes through `shared`, is the layer in all else."""

    def __init__(self, shared: _Projections, name: str, layer: nn.Module):
        self._shared = shared
        self._name = name
        self._layer = layer

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs:
            return self._layer(x, *args, **kwargs)
        return self._shared.take(self._name, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Projections:
    """An attention as its own forward sees it for one call: q, k and v are computed together and handed out one by one.

    It lives as long as the call, so that nothing outlives an interrupted one, and nothing outside changes, which
    `torch.compile` does not allow inside a checkpoint.

    Args:
        attention: the attention.
        source: an input of q, k and v whose outputs are known.
        ready: these outputs, by the names of the projections.
    """

    def __init__(
        self, attention: nn.Module, source: torch.Tensor | None = None, ready: dict[str, torch.Tensor] | None = None
    ):
        self._attention = attention
        self._source = source
        self._ready: dict[str, torch.Tensor] = {} if ready is None else ready
        self.q_proj = _Projection(self, "q_proj", attention.q_proj)
        self.k_proj = _Projection(self, "k_proj", attention.k_proj)
        self.v_proj = _Projection(self, "v_proj", attention.v_proj)
        self.o_proj = _Projection(self, "o_proj", attention.o_proj)

    def take(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What projection `name` makes of x."""
        if name == "o_proj":
            return self._attention.apply_o(x)
        if self._source is not x or name not in self._ready:
            query, key, value = self._attention.apply_qkv(x)
            self._source, self._ready = x, dict(zip(QKV, (query, key, value), strict=True))
        output = self._ready.pop(name)
        if not self._ready:
            # This object and its projections refer to each other: what it held would live until the garbage collector ran.
            self._source = None
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


def read_original_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward that a class came with."""
    return cls._original_forward if hasattr(cls, "_original_forward") else cls.forward


@functools.cache
def wrapped_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """An attention's forward in which its projections go through its `apply_qkv` and `apply_o`, where it has them."""

    def axolotl_attn_forward(self, *args, **kwargs):
        return original(_Projections(self) if hasattr(self, "apply_qkv") else self, *args, **kwargs)

    # The signature stays visible to those who look for it.
    axolotl_attn_forward.__wrapped__ = original
    return axolotl_attn_forward


@functools.cache
def rotating_forward(original: Callable[..., Any], rotation: Rotation) -> Callable[..., Any]:
    """`wrapped_forward`, except that queries and keys come rotated from the attention's `apply_qkv_rotated`, where it gives any."""
    plain = wrapped_forward(original)

    def axolotl_attn_forward(self, *args, **kwargs):
        tables = rotation.find_tables(args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        rotated = None if tables is None else self.apply_qkv_rotated(hidden, *tables)
        if rotated is None:
            return plain(self, *args, **kwargs)
        return rotation.forward(_Projections(self, hidden, dict(zip(QKV, rotated, strict=True))), *args, **kwargs)

    axolotl_attn_forward.__wrapped__ = original
    return axolotl_attn_forward


@functools.cache
def _subclass(cls: type[nn.Module], members: tuple[tuple[str, Any], ...]) -> type[nn.Module]:
    """`cls` with other members, under its own name. One class for all instances, as `torch.compile` guards on classes."""
    return type(cls.__name__, (cls,), {"_lora_kernels_base": cls, "__module__": cls.__module__, **dict(members)})


def become(module: nn.Module, **members: Any) -> None:
    """Let a module be of a class with other members; `_original_forward` is the forward that its own class came with."""
    base = getattr(type(module), "_lora_kernels_base", type(module))
    members["_original_forward"] = read_original_forward(base)
    module.__class__ = _subclass(base, tuple(sorted(members.items(), key=lambda member: member[0])))


def get_attention_cls_from_config(cfg: DictDefault) -> type[nn.Module]:
    """The attention class of the model that `base_model` names, by the naming convention of transformers.

    Raises:
        ModelError: transformers has no such class.
    """
    config = AutoConfig.from_pretrained(
        cfg.base_model_config or cfg.base_model, trust_remote_code=bool(cfg.trust_remote_code)
    ).get_text_config()
    prefix = type(config).__name__.removesuffix("Config")
    path = type(config).__module__.replace("configuration_", "modeling_")
    names = [f"{prefix}Attention", f"{prefix}SelfAttention", f"{prefix.removesuffix('Text')}Attention"]
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise ModelError(f"`base_model: {cfg.base_model}`: there is no modeling code at {path}.") from error
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise ModelError(f"`base_model: {cfg.base_model}`: {path} has none of {', '.join(names)}.")


def patch_self_attn_lora(cfg: DictDefault) -> None:
    """Prepare the attention class of the model that `cfg` names.

    Its `forward` becomes `axolotl_attn_forward`, which runs the original (kept as `_original_forward`); where an instance
    has `apply_qkv` and `apply_o`, its projections go through them. `apply_lora_kernel_patches` does not need it.
    """
    attention_cls = get_attention_cls_from_config(cfg)
    if "_original_forward" not in attention_cls.__dict__:
        attention_cls._original_forward = attention_cls.forward
        attention_cls.forward = wrapped_forward(attention_cls._original_forward)


# --- models -----------------------------------------------------------------------------------------------------------


def get_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model, with or without an adapter, text-only or multimodal.

    Raises:
        ModelError: it has none.
    """
    base = plain_model(model)
    for path in (
        "model.language_model.layers",
        "language_model.model.layers",
        "model.layers",
        "language_model.layers",
        "layers",
    ):
        module: Any = base
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.ModuleList):
            return list(module)
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ModelError(f"{type(base).__name__} has no list of layers. Set `lora_*_kernel: false`.")
    return list(max(lists, key=len))


def find_attentions(layers: list[nn.Module]) -> list[nn.Module]:
    """The attentions to themselves among the modules of decoder layers, with projections under the usual names."""
    return [
        module
        for layer in layers
        for name, module in layer.named_modules()
        if "cross" not in name.rpartition(".")[2]
        and "attn" in name.rpartition(".")[2] + type(module).__name__.lower()
        and _has_all(module, (*QKV, "o_proj"))
    ]


def _why_never_fused(proj: Any) -> str | None:
    """What cannot change while a model trains: the kind of a projection and of its weight."""
    if not isinstance(proj, nn.Module):
        return "it lacks a projection"
    base = proj.base_layer if isinstance(proj, LoraLayer) else proj
    kind = type(base).__name__
    if kind != "Linear4bit":
        if type(base) is not nn.Linear:
            return f"a base layer is {kind}"
        if type(base.weight) is not nn.Parameter or not base.weight.is_floating_point():
            return f"a weight is {type(base.weight).__name__} of {base.weight.dtype}"
    if "forward" in proj.__dict__ or "forward" in base.__dict__:
        return "somebody else has replaced the forward of a projection"
    if isinstance(proj, LoraLayer) and getattr(proj, "fan_in_fan_out", False):
        return "`lora_fan_in_fan_out` stores its weights transposed"
    return None


def _why_not(projections: list[Any]) -> str | None:
    reasons = (_why_never_fused(proj) or why_not_fused(proj) for proj in projections)
    reason = next((reason for reason in reasons if reason), None)
    if reason is None and not any(isinstance(proj, LoraLayer) for proj in projections):
        reason = "it has no adapter"
    return reason


def _children(module: nn.Module, names: tuple[str, ...]) -> list[Any]:
    return [getattr(module, name, None) for name in names]


def _has_all(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(isinstance(child, nn.Module) for child in _children(module, names))


def _computes_the_same(mlp: nn.Module) -> bool:
    """Whether the forward of an MLP gives what its original forward gives, on two random tokens.

    Between `act(gate) * up` and the real thing there may be a factor, a clamp or a norm that no attribute tells of.
    """
    base = mlp.gate_proj.base_layer if isinstance(mlp.gate_proj, LoraLayer) else mlp.gate_proj
    weight = base.weight
    if weight.is_meta:
        return True  # Sharded loading: the weights come later, and the first rank's check would not bind the others.
    quant = getattr(weight, "quant_state", None)
    dtype = weight.dtype if quant is None else quant.dtype
    generator = torch.Generator().manual_seed(0)
    # It asks for a gradient because bitsandbytes repacks weights on a CPU for inputs that do not.
    x = torch.randn(1, 2, base.in_features, generator=generator).to(weight.device, dtype).requires_grad_()
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        wanted, got = mlp._original_forward(x).float(), mlp(x).float()
    return bool((got - wanted).norm() <= _TOLERANCE * wanted.norm().clamp_min(1e-6))


def _join(projections: list[nn.Module]) -> int:
    """Let the dense weights of projections of one input, and A of their adapters, share one memory: compiled layers multiply
    them at once.

    Returns:
        Rows that were left below them for the A matrices of their adapters.
    """
    weights: list[Any] = [
        proj.base_layer.weight if isinstance(proj, LoraLayer) else proj.weight for proj in projections
    ]
    first, *others = weights
    alike = all(
        (weight.device, weight.dtype, weight.shape[-1]) == (first.device, first.dtype, first.shape[-1])
        for weight in others
    )
    if not alike or not all(w.is_cuda and w.is_floating_point() and w.is_contiguous() for w in weights):
        return 0
    ranks = sum(max(proj.r.values()) for proj in projections if isinstance(proj, LoraLayer))
    room = round_up_rank(ranks, alone=len(projections) == 1)
    lay_in_a_row(weights, room)
    return room


class _MLPPatcher:
    """Chooses the forward for MLPs; the numeric check runs once per class of MLP."""

    def __init__(self) -> None:
        self.checked: dict[type, bool] = {}

    def __call__(self, mlp: nn.Module) -> str | None:
        """Patch one MLP. Returns why not, or None."""
        if hasattr(mlp, "_lora_kernels_base"):
            return None
        reason = (
            "somebody else has replaced its forward" if "forward" in mlp.__dict__ else _why_not(_children(mlp, _MLP))
        )
        if reason:
            return reason
        kind = type(getattr(mlp, "act_fn", None))
        members: dict[str, Any]
        if kind in _SILU:
            members = {"forward": apply_lora_mlp_swiglu}
        elif kind in _GELU | _GELU_TANH:
            members = {"forward": apply_lora_mlp_geglu, "gelu_approximate": "tanh" if kind in _GELU_TANH else "none"}
        else:
            return f"its activation is {kind.__name__}"
        plain = type(mlp)
        become(mlp, **members)
        if type(mlp) not in self.checked:
            self.checked[type(mlp)] = _computes_the_same(mlp)
        if not self.checked[type(mlp)]:
            mlp.__class__ = plain
            return f"{plain.__name__} computes more than `down(act(gate) * up)`"
        rooms = {"adapter_room": _join([mlp.gate_proj, mlp.up_proj]), "adapter_room_down": _join([mlp.down_proj])}
        become(mlp, **members, **rooms)
        return None


def why_not_seen_through(attention: nn.Module) -> str | None:
    """Whether an attention's forward can run with `_Projections` in place of itself: not when it needs to be itself."""
    if "forward" in attention.__dict__:
        return "somebody else has replaced its forward"
    code = getattr(inspect.unwrap(read_original_forward(type(attention))), "__code__", None)
    if code is None:
        return "its forward is no Python function"
    if "__class__" in code.co_freevars or any(step.opname == "STORE_ATTR" for step in dis.get_instructions(code)):
        return "its forward calls that of its parent class, or keeps state"
    return None


def _why_not_qkv(attention: nn.Module) -> str | None:
    if getattr(attention, "is_kv_shared_layer", False):
        return "it takes keys and values from another layer"
    return why_not_seen_through(attention) or _why_not(_children(attention, QKV))


def _why_not_o(attention: nn.Module) -> str | None:
    return why_not_seen_through(attention) or _why_not([attention.o_proj])


def _patch_attentions(attentions: list[nn.Module], cfg: DictDefault) -> None:
    qkv = [_why_not_qkv(attention) for attention in attentions] if cfg.lora_qkv_kernel else []
    out = [_why_not_o(attention) for attention in attentions] if cfg.lora_o_kernel else []
    rotated = []
    for at, attention in enumerate(attentions):
        if why_not_seen_through(attention):
            continue
        original = read_original_forward(type(attention))
        forward = wrapped_forward(original) if None in qkv or None in out else original
        if qkv and qkv[at] is None:
            rotation = find_rotation(attention, original)
            rotated.append(rotation if isinstance(rotation, str) else None)
            if isinstance(rotation, Rotation):
                forward = rotating_forward(original, rotation)
        become(
            attention,
            adapter_room=_join(_children(attention, QKV)) if qkv and qkv[at] is None else 0,
            adapter_room_o=_join([attention.o_proj]) if out and out[at] is None else 0,
            forward=forward,
            apply_qkv=apply_lora_qkv if qkv and qkv[at] is None else original_apply_qkv,
            apply_qkv_rotated=apply_lora_qkv_rotated,
            apply_o=apply_lora_o if out and out[at] is None else original_apply_o,
        )
    if cfg.lora_qkv_kernel:
        _note(cfg, "lora_qkv_kernel", "attention layers", qkv)
        LOG.debug(
            f"Compiled, {rotated.count(None)} of them rotate in an operator; others: {Counter(filter(None, rotated))}"
        )
    if cfg.lora_o_kernel:
        _note(cfg, "lora_o_kernel", "attention layers", out)


def _patch_embedding(module: LoraEmbedding) -> str | None:
    """Patch one embedding with an adapter. Returns why not, or None."""
    if hasattr(module, "_lora_kernels_base"):
        return None
    base = module.base_layer
    if type(base) is not nn.Embedding or base.max_norm is not None or base.sparse or base.scale_grad_by_freq:
        return f"its base layer is {type(base).__name__} with options of its own"
    become(module, forward=apply_lora_embedding)
    return None


def _note(cfg: DictDefault, key: str, what: str, results: list[str | None]) -> None:
    """Say how many layers run fused, and why the others do not."""
    fused = results.count(None)
    reasons = Counter(reason for reason in results if reason)
    if reasons:
        why = "; ".join(f"{count} because {reason}" for reason, count in reasons.most_common())
        note_choice(cfg, key, f"{fused} of {len(results)} {what}", f"the others run as plain layers: {why}")
    elif not results:
        note_choice(cfg, key, False, f"the model has no {what} of the form that it knows")
    else:
        LOG.info(f"{key}: {fused} {what}")


def apply_lora_kernel_patches(model: PeftModel, cfg: DictDefault) -> PeftModel:
    """Let the layers of a model with an adapter run as the functions of `axolotl.kernels.lora`, where they fit.

    Args:
        model: a model of peft.
        cfg: the config; reads `lora_mlp_kernel`, `lora_qkv_kernel`, `lora_o_kernel` and `lora_embedding_kernel`.

    Returns:
        `model`, changed in place. Layers that do not fit are noted and stay as they are.

    Raises:
        TypeError: `model` has no adapter.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"Model must be a PeftModel, but it is a {type(model).__name__}.")
    wanted = [key for key in LORA_KERNELS if cfg[key]]
    refused = read_model_support(model.get_base_model().config.model_type).lora_kernels_refused
    if refused:
        for key in wanted:
            note_choice(cfg, key, False, f"the fused LoRA kernels do not fit this model: {refused}")
        return model
    layers = get_layers(model)
    if cfg.lora_qkv_kernel or cfg.lora_o_kernel or cfg.lora_mlp_kernel:
        _patch_attentions(find_attentions(layers), cfg)
    if cfg.lora_mlp_kernel:
        patch = _MLPPatcher()
        mlps = [module for layer in layers for module in layer.modules() if _has_all(module, _MLP)]
        _note(cfg, "lora_mlp_kernel", "MLPs", [patch(mlp) for mlp in mlps])
    if cfg.lora_embedding_kernel:
        embeddings = [module for module in model.modules() if isinstance(module, LoraEmbedding)]
        if embeddings:  # Few adapters have one, and then there is nothing to say.
            _note(cfg, "lora_embedding_kernel", "embeddings", [_patch_embedding(module) for module in embeddings])
    return model


def remove_lora_kernel_patches(model: nn.Module) -> None:
    """Undo `apply_lora_kernel_patches`: every module is of its own class again."""
    for module in model.modules():
        if hasattr(module, "_lora_kernels_base"):
            module.__class__ = type(module)._lora_kernels_base
