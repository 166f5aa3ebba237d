"""Which attentions rotate their queries and keys right after projecting them, and their forward without that rotation.

In compiled layers an operator projects and rotates at once (`axolotl.kernels.lora_rotary`). The attention's own forward then runs
as a copy in which the name `apply_rotary_pos_emb` stands for a function that hands back what it gets. The copy reads the globals
of its own module, so that what somebody replaces there later is seen; one name is added to them, and none is changed.

Whether a forward is of this form is found out by running it up to its rotation, with projections that give random numbers: a norm,
a scale or a clamp in between, a rotation of a part of each head, or one in another order, all tell. That is asked of every
attention, as the layers of one class may differ (some have no positions at all).
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from axolotl.kernels.lora_rotary import rotate

_ROTATION = "apply_rotary_pos_emb"
_EMBEDDINGS = "position_embeddings"
_ADDED = "_axolotl_already_rotated"

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")

# A forward that cannot run with stand-ins fails with one of these. It is then left as it is, and the reason is returned.
_FAILURES = (AttributeError, TypeError, ValueError, LookupError, RuntimeError, NotImplementedError)


def _already_rotated(query: torch.Tensor, key: torch.Tensor, cos: Any, sin: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands for `apply_rotary_pos_emb` where queries and keys come rotated."""
    return query, key


class Rotation(NamedTuple):
    """How an attention's forward rotates.

    Attributes:
        module: the module of the forward.
        function: its `apply_rotary_pos_emb`, as it was when it was looked at.
        forward: the forward without the rotation, called as the forward is.
        place: of `position_embeddings` among the positional arguments after `self`.
    """

    module: types.ModuleType
    function: Callable[..., Any]
    forward: Callable[..., Any]
    place: int

    def find_tables(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin among the arguments of the forward, or None when it would not rotate by them as it did."""
        if getattr(self.module, _ROTATION) is not self.function:
            return None
        found = args[self.place] if len(args) > self.place else kwargs.get(_EMBEDDINGS)
        if not isinstance(found, tuple) or len(found) != 2:
            return None
        cos, sin = found
        return (cos, sin) if isinstance(cos, torch.Tensor) and isinstance(sin, torch.Tensor) else None


@functools.cache
def _read_rotation(forward: types.FunctionType) -> Rotation | str:
    """How a forward rotates as far as its code tells, or why it is not of the form looked for."""
    names = list(inspect.signature(forward).parameters)
    if names[:2] != ["self", "hidden_states"] or _EMBEDDINGS not in names:
        return "its forward takes no `hidden_states` and `position_embeddings`"
    uses = [step.opname for step in dis.get_instructions(forward) if step.argval == _ROTATION]
    if uses != ["LOAD_GLOBAL"]:
        return "its forward does not rotate by one `apply_rotary_pos_emb`"
    module = inspect.getmodule(forward)
    function = forward.__globals__.get(_ROTATION)
    if module is None or vars(module) is not forward.__globals__:
        return "its forward is of no module"
    if not isinstance(function, types.FunctionType) or function.__module__ != module.__name__:
        return "somebody else has replaced its rotation"
    if not _rotates_halves(function):
        return "its rotation is another one"
    forward.__globals__.setdefault(_ADDED, _already_rotated)
    read = tuple(_ADDED if name == _ROTATION else name for name in forward.__code__.co_names)
    copy = _copy(forward, forward.__code__.replace(co_names=read), forward.__globals__)
    return Rotation(module, function, copy, names.index(_EMBEDDINGS) - 1)


def _copy(forward: types.FunctionType, code: types.CodeType, names: dict[str, Any]) -> types.FunctionType:
    """A function with the arguments of `forward`, and other code and globals."""
    copy = types.FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _rotates_halves(function: Callable[..., Any]) -> bool:
    """Whether `function(query, key, cos, sin)` is what the kernels compute, on random numbers."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 3, 8, generator=generator, device="cpu") for heads in (4, 2))
    cos, sin = torch.randn(2, 2, 3, 8, generator=generator, device="cpu").unbind()
    try:
        got = function(query, key, cos, sin)
    except _FAILURES:
        return False
    wanted = [rotate(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (query, key)]
    return len(got) == 2 and all(torch.allclose(*pair, atol=1e-5) for pair in zip(got, wanted, strict=True))


# --- running a forward up to its rotation -------------------------------------------------------------------------------


class _Reached(Exception):
    """Ends a forward: with what it would rotate, or with nothing where it would not."""


class _Config:
    """A config that ends the forward when it is asked for the attention function, which follows the rotation."""

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "_attn_implementation":
            raise _Reached
        return getattr(self._config, name)


class _StandIn:
    """An attention whose projections give these numbers once and for one input, and end the forward otherwise."""

    def __init__(self, attention: nn.Module, hidden: torch.Tensor, outputs: list[torch.Tensor]):
        self._attention = attention
        # Copies: the forward may change them.
        waiting = {name: output.clone() for name, output in zip(_PROJECTIONS, outputs, strict=True)}
        for name in _PROJECTIONS:
            setattr(self, name, lambda x, name=name: waiting.pop(name) if x is hidden and name in waiting else _end())
        if hasattr(attention, "config"):
            self.config = _Config(attention.config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


def _end(*args: Any, **kwargs: Any) -> Any:
    raise _Reached(*args, kwargs)


def find_rotation(attention: nn.Module, forward: Callable[..., Any]) -> Rotation | str:
    """How an attention rotates, or why its rotation is left to its forward.

    Args:
        attention: with `q_proj`, `k_proj` and `v_proj`, linear layers. It is not changed, and its weights are not used.
        forward: that of its class.
    """
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return "its forward is wrapped"
    rotation = _read_rotation(forward)
    if isinstance(rotation, str):
        return rotation
    size = getattr(attention, "head_dim", None)
    widths = [getattr(getattr(attention, name), "out_features", 0) for name in _PROJECTIONS]
    if not isinstance(size, int) or size % 2 or not all(width and width % size == 0 for width in widths):
        return "its heads are of another form"
    generator = torch.Generator().manual_seed(0)
    # So large and unlike each other that a norm, a clamp or a factor would show.
    outputs = [1000 * torch.randn(1, 3, width // size, size, generator=generator, device="cpu") for width in widths]
    hidden, cos, sin = torch.randn(1, 3, 1), *torch.randn(2, 1, 3, size, generator=generator, device="cpu").unbind()
    given: dict[str, Any] = {_EMBEDDINGS: (cos, sin)}
    for name, parameter in list(inspect.signature(forward).parameters.items())[2:]:
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD and name not in given:
            given[name] = None
    try:
        _copy(forward, forward.__code__, {**forward.__globals__, _ROTATION: _end})(
            _StandIn(attention, hidden, outputs), hidden, **given
        )
    except _Reached as reached:
        found = reached.args
    except _FAILURES as error:
        return f"its forward cannot be followed ({type(error).__name__})"
    else:
        found = ()
    if len(found) != 5 or found[4] or found[2] is not cos or found[3] is not sin:
        return "its forward does not rotate by what it is given"
    if not all(torch.equal(got, output.transpose(1, 2)) for got, output in zip(found[:2], outputs, strict=False)):
        return "its forward changes queries or keys before it rotates them"
    return rotation
