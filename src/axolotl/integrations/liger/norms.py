"""Norms in one kernel each: RMS norms, RMS norms with a gate, layer norms.

RMSNorm (https://arxiv.org/abs/1910.07467) is `x / sqrt(mean(x^2) + eps) * (offset + weight)`: the offset is 1 in Gemma, and
models differ in whether they round before or after the weight. `read_rms_norm` finds out which one a module is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from axolotl.integrations.liger import swap
from axolotl.integrations.liger.swap import NOT_MADE_FOR, plain, random_numbers, small_copy, swap_each
from axolotl.kernels.glu import gated

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
# As in the module, which computes in fp32 and may divide or multiply by the root.
_TOLERANCE = 1e-4

# (x, weight, eps, offset, casting) -> the norm. `casting` is "llama" (rounds before the weight) or "gemma" (after).
RmsNorm = Callable[[torch.Tensor, torch.Tensor, float, float, str], torch.Tensor]
LayerNorm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class RmsNormKind:
    """What an RMS norm computes.

    Attributes:
        eps_name: the attribute that holds its epsilon.
        offset: what is added to the weight.
        casting: `llama` rounds before the weight, `gemma` after.
        gate: None; `after`: `norm(x) * silu(gate)`; `before`: `norm(x * silu(gate))`.
    """

    eps_name: str
    offset: float
    casting: str
    gate: str | None = None


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, casting: str) -> torch.Tensor:
    """PyTorch's own fused RMS norm. It rounds once, after the weight."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, weight.shape, weight + offset if offset else weight, eps)


def _formula(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: RmsNormKind, gate: torch.Tensor | None) -> Any:
    """The norm in PyTorch, with the roundings of `kind`."""
    wide = x.double()
    if gate is not None and kind.gate == "before":
        wide = wide * F.silu(gate.double())
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if kind.casting == "llama":
        wide = (wide.to(x.dtype) * (kind.offset + weight)).double()
    else:
        wide = wide * (kind.offset + weight.double())
    if gate is not None and kind.gate == "after":
        wide = wide * F.silu(gate.double())
    return wide.to(x.dtype)


def read_rms_norm(norm: nn.Module) -> RmsNormKind | str:
    """What `norm` computes, or why it is no RMS norm that is known here."""
    weight = norm._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(norm._parameters) != 1 or norm._modules:
        return "it has other weights than one per channel"
    eps_name = next((name for name in _EPS_NAMES if isinstance(getattr(norm, name, None), float)), None)
    if eps_name is None:
        return "its epsilon is not found"
    eps, size = getattr(norm, eps_name), 64
    # Small enough that the epsilon shows.
    x, gate, random_weight = (
        random_numbers(3, size) * 1e-3,
        random_numbers(3, size, seed=1),
        random_numbers(size, seed=2),
    )
    gates = ("after", "before") if is_gated(norm) else (None,)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        probe = small_copy(norm, {"weight": nn.Parameter(random_weight.to(dtype), requires_grad=False)})
        inputs = (x.to(dtype), gate.to(dtype)) if is_gated(norm) else (x.to(dtype),)
        try:
            results[dtype] = probe.forward(*inputs)
        except NOT_MADE_FOR as error:
            return f"it does not take what an RMS norm takes ({type(error).__name__})"

    def distance(kind: RmsNormKind, dtype: torch.dtype) -> float:
        wanted = _formula(x.to(dtype), random_weight.to(dtype), eps, kind, gate.to(dtype) if kind.gate else None)
        got = results[dtype]
        if not isinstance(got, torch.Tensor) or got.shape != wanted.shape:
            return float("inf")
        return float((got.double() - wanted.double()).norm() / wanted.double().norm())

    kinds = [RmsNormKind(eps_name, offset, "llama", place) for offset in (0.0, 1.0) for place in gates]
    found = next((kind for kind in kinds if distance(kind, torch.float32) < _TOLERANCE), None)
    if found is None:
        return f"{type(norm).__name__} computes something else"
    return min(
        (RmsNormKind(eps_name, found.offset, casting, found.gate) for casting in ("llama", "gemma")),
        key=lambda kind: distance(kind, torch.bfloat16),
    )


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is worth asking: by its name a norm, and none of PyTorch's own, which are fused."""
    cls = type(module)
    return "norm" in cls.__name__.lower() and not cls.__module__.startswith("torch.") and "weight" in module._parameters


def is_gated(module: nn.Module) -> bool:
    return "gated" in type(module).__name__.lower()


@functools.cache
def _rms_norm_forward(kernel: RmsNorm, kind: RmsNormKind) -> Callable[..., torch.Tensor]:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if not _takes(kernel, hidden_states, self.weight):
            return plain(self, hidden_states)
        return kernel(hidden_states, self.weight, getattr(self, kind.eps_name), kind.offset, kind.casting)

    def gated_forward(self: Any, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if not _takes(kernel, hidden_states, self.weight) or gate.shape != hidden_states.shape:
            return plain(self, hidden_states, gate)
        eps = getattr(self, kind.eps_name)
        if kind.gate == "before":
            hidden_states = gated(gate, hidden_states, "silu")
        normed = kernel(hidden_states, self.weight, eps, kind.offset, kind.casting)
        return gated(gate, normed, "silu").to(normed.dtype) if kind.gate == "after" else normed

    return gated_forward if kind.gate else forward


def _takes(kernel: RmsNorm, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """PyTorch fuses only what has one dtype."""
    return swap.runs_fused(x) and (kernel is not torch_rms_norm or x.dtype == weight.dtype)


def fuse_rms_norms(model: nn.Module, kernel: RmsNorm, *, gate: bool) -> list[str | None]:
    """Swap the RMS norms of `model`, or with `gate` those that take a gate.

    Returns:
        For each norm, why it stays as it is, or None.
    """

    def find_forward(norm: nn.Module) -> Callable[..., torch.Tensor] | str:
        kind = read_rms_norm(norm)
        return _rms_norm_forward(kernel, kind) if isinstance(kind, RmsNormKind) else kind

    return swap_each(model, lambda module: is_rms_norm(module) and is_gated(module) == gate, find_forward)


@functools.cache
def _layer_norm_forward(kernel: LayerNorm) -> Callable[..., torch.Tensor]:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if not swap.runs_fused(hidden_states):
            return plain(self, hidden_states)
        return kernel(hidden_states, self.weight, self.bias, self.eps)

    return forward


def fuse_layer_norms(model: nn.Module, kernel: LayerNorm) -> list[str | None]:
    """Swap the layer norms of `model`. Returns, for each, why it stays as it is, or None."""

    def find_forward(norm: nn.Module) -> Callable[..., torch.Tensor] | str:
        if type(norm) is not nn.LayerNorm or norm.bias is None or norm.weight.dim() != 1:
            return "it is no layer norm over channels with a weight and a bias"
        return _layer_norm_forward(kernel)

    return swap_each(model, lambda module: isinstance(module, nn.LayerNorm), find_forward)
