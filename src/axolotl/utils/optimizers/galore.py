"""GaLore: any optimizer on gradients of low rank (Zhao et al., https://arxiv.org/abs/2403.03507), and Q-GaLore.

The gradient of a matrix is projected on its leading singular vectors, another optimizer takes its step there, and the step
is projected back. The states of that optimizer have the size of the projection. Q-GaLore (https://arxiv.org/abs/2407.08296)
keeps the projection in few bits and renews it less often where it hardly turns.

The package `galore_torch` does the same for each optimizer apart; its 8-bit optimizers do not run with current
`bitsandbytes`, and its states are Python objects, which a checkpoint should not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from axolotl.exceptions import ConfigError
from axolotl.integrations.base import BaseOptimizerFactory
from axolotl.utils.optimizers.groups import Groups, param_groups_of, split_groups, target_parameters
from axolotl.utils.optimizers.in_backward import step_in_backward
from axolotl.utils.optimizers.parameterwise import run_closure
from axolotl.utils.optimizers.state import keep_loaded_dtypes

# `proj_type` -> the side that is projected, for matrices with at least as many rows as columns, and for the others.
SIDES = {
    "std": ("right", "left"),
    "reverse_std": ("left", "right"),
    "right": ("right", "right"),
    "left": ("left", "left"),
}

PROJECTION_DEFAULTS: dict[str, Any] = {
    "rank": 128,
    "update_proj_gap": 200,
    "scale": 0.25,
    "proj_type": "std",
    "proj_bits": 0,
    "proj_group_size": 256,
    "cos_threshold": 1.1,
    "gamma_proj": 2,
    "queue_size": 5,
}


class GaLore(Optimizer):
    """The optimizer.

    Args:
        groups: param groups. Those with `rank` are projected; the other entries of `PROJECTION_DEFAULTS` belong to them:
            rank: of the projection, at most the smaller side of the matrix.
            update_proj_gap: steps between two singular value decompositions.
            scale: factor of the step that is projected back.
            proj_type: a key of `SIDES`.
            proj_bits: bits of the stored projection; 0 for full precision.
            proj_group_size: values that share a scale and a zero point.
            cos_threshold: the gap grows when the first vector of the last `queue_size` decompositions turned so little
                that the mean cosine is at least this; above 1 for never.
            gamma_proj: factor by which it grows.
            queue_size: cosines in the mean.
        inner_cls: optimizer of the projected gradients and of the other parameters.
        inner_kwargs: its arguments.
        lr: learning rate of the run, which some schedules read from the defaults.
    """

    def __init__(self, groups: Groups, inner_cls: type[Optimizer], inner_kwargs: dict[str, Any], lr: float = 1e-3):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self._projected: dict[Tensor, nn.Parameter] = {}
        inner_groups = []
        for group in self.param_groups:
            params = group["params"]
            if "rank" in group:
                for param in params:
                    low = torch.zeros(_low_shape(param, group), dtype=param.dtype, device=param.device)
                    self._projected[param] = nn.Parameter(low)
                params = [self._projected[param] for param in params]
            inner_groups.append({"params": params, "lr": group["lr"], "weight_decay": _inner_decay(group)})
        self.inner = inner_cls(inner_groups, **inner_kwargs)
        keep_loaded_dtypes(self.inner)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Returns what the closure returned."""
        loss = run_closure(closure)
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner["lr"], inner["weight_decay"] = group["lr"], _inner_decay(group)
            for param in group["params"] if "rank" in group else ():
                if param.grad is not None:
                    low = self._projected[param]
                    low.zero_()
                    low.grad = self._project(param, group)
        self.inner.step()
        for group in self.param_groups:
            for param in group["params"] if "rank" in group else ():
                low = self._projected[param]
                if low.grad is not None:
                    low.grad = None
                    vectors, side = self._vectors(param, group).to(param.dtype), _side(param, group)
                    step = low @ vectors if side == "right" else vectors.T @ low
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(step, alpha=group["scale"])
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State of the projections, and under `inner` that of the other optimizer."""
        return {**super().state_dict(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state.

        Raises:
            ValueError: it is that of another optimizer.
        """
        if "inner" not in state_dict:
            raise ValueError("it has no projections")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "inner"})
        self.inner.load_state_dict(state_dict["inner"])

    def _project(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        """The projected gradient; renews the projection when it is time to."""
        state, gradient, side = self.state[param], param.grad, _side(param, group)
        assert gradient is not None
        if not state:
            state.update(step=0, gap=group["update_proj_gap"], cosines=[])
        if state["step"] % state["gap"] == 0:
            self._renew(gradient, side, state, group)
        state["step"] += 1
        vectors = self._vectors(param, group).to(gradient.dtype)
        return gradient @ vectors.T if side == "right" else vectors @ gradient

    def _renew(self, gradient: Tensor, side: str, state: dict[str, Any], group: dict[str, Any]) -> None:
        left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
        vectors = (right if side == "right" else left.T)[: group["rank"]].contiguous()
        if group["cos_threshold"] <= 1:
            if "first" in state:
                cosine = torch.nn.functional.cosine_similarity(state["first"], vectors[0], dim=0).item()
                state["cosines"] = [*state["cosines"], cosine][-group["queue_size"] :]
                full = len(state["cosines"]) == group["queue_size"]
                if full and sum(state["cosines"]) / group["queue_size"] >= group["cos_threshold"]:
                    state["gap"] = int(state["gap"] * group["gamma_proj"])
            state["first"] = vectors[0].clone()
        if group["proj_bits"]:
            state["codes"], state["scales"], state["zeros"] = quantize(
                vectors, group["proj_bits"], group["proj_group_size"]
            )
        else:
            # A view would keep all vectors, in checkpoints too.
            state["vectors"] = vectors.to(gradient.dtype, copy=True)

    def _vectors(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        """Singular vectors as rows, rank x side of the matrix."""
        state = self.state[param]
        if "vectors" in state:
            return state["vectors"]
        rank, length = min(group["rank"], *param.shape), param.shape[1 if _side(param, group) == "right" else 0]
        values = (state["codes"].float() - state["zeros"]) * state["scales"]
        return values.flatten()[: rank * length].view(rank, length)


def _side(param: Tensor, group: dict[str, Any]) -> str:
    tall, wide = SIDES[group["proj_type"]]
    return tall if param.shape[0] >= param.shape[1] else wide


def _low_shape(param: Tensor, group: dict[str, Any]) -> tuple[int, int]:
    rows, columns = param.shape
    rank = min(group["rank"], rows, columns)
    return (rows, rank) if _side(param, group) == "right" else (rank, columns)


def _inner_decay(group: dict[str, Any]) -> float:
    """Whole weights decay here; a projected step must not."""
    return 0.0 if "rank" in group else group["weight_decay"]


def quantize(values: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to `bits` bits, each `group_size` values with a scale and a zero point of their own.

    Args:
        values: any shape; padded with zeros to whole groups.
        bits: at most 8.
        group_size: values per group.

    Returns:
        (codes uint8 (groups, group_size), scales (groups, 1), zeros (groups, 1)): `(codes - zeros) * scales`.
    """
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % group_size)).view(-1, group_size)
    low, high = flat.amin(dim=1, keepdim=True), flat.amax(dim=1, keepdim=True)
    levels = 2**bits - 1
    scales = (high - low).clamp(min=1e-5) / levels
    zeros = (-low / scales).round()
    codes = (flat / scales + zeros).round().clamp(0, levels).to(torch.uint8)
    return codes, scales, zeros


class ProjectionFactory(BaseOptimizerFactory):
    """Creates an optimizer that projects the gradients of the layers of `optim_target_modules`: `GaLore`, or a library's own."""

    def __call__(
        self,
        opt_model: nn.Module,
        training_args: Any,
        *,
        name: str,
        lr: float,
        weight_decay: float,
        inner_cls: type[Optimizer],
        inner_kwargs: dict[str, Any],
        projection: dict[str, Any],
        layerwise: bool = False,
        projects_itself: bool = False,
        state_types: tuple[type, ...] = (),
        **_: Any,
    ) -> Optimizer:
        """Create the optimizer.

        Args:
            opt_model: the model.
            training_args: `optim_target_modules` and the learning rates by group are read.
            name: of the optimizer, for errors.
            lr, weight_decay: for the groups.
            inner_cls, inner_kwargs: as `GaLore`.
            projection: options of the projection, for the groups of the layers.
            layerwise: update in the backward pass.
            projects_itself: `inner_cls` reads these options from its groups (APOLLO); otherwise they are `GaLore`'s.
            state_types: classes of objects in its state.
        """
        options = projection if projects_itself else {**PROJECTION_DEFAULTS, **projection}
        groups = target_groups(opt_model, training_args, name, lr, weight_decay, options)
        if projects_itself:
            optimizer = inner_cls(groups, lr=lr, **inner_kwargs)
            keep_loaded_dtypes(optimizer, state_types)
        else:
            optimizer = GaLore(groups, inner_cls, inner_kwargs, lr=lr)
        if layerwise:
            step_in_backward(optimizer)
        return optimizer


def target_groups(
    model: nn.Module, args: Any, name: str, lr: float, weight_decay: float, projection: dict[str, Any]
) -> Groups:
    """Param groups, with `projection` in those of the layers of `optim_target_modules`.

    Raises:
        ConfigError: no such layers, or their weights are sharded.
    """
    targets = target_parameters(model, args.optim_target_modules, name)
    groups = param_groups_of(model, args, lr, weight_decay)
    if any(isinstance(param, DTensor) for group in groups for param in group["params"]):
        raise ConfigError(
            f"`optimizer: {name}` projects whole matrices, and `fsdp_config` shards them. Train on one GPU or with data "
            "parallel alone, or choose another optimizer."
        )
    return split_groups(groups, lambda p: id(p) in targets, lambda target: projection if target else {})
