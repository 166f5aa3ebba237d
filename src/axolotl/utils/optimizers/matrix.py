"""Optimizers for weight matrices, joined with AdamW for everything else.

Muon, Dion and SinkGD update the matrices of hidden layers. Embeddings, the output head, norms and biases need another
optimizer, AdamW. `MatrixOptimizer` is both as one, so that schedules, clipping and checkpoints see one optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from axolotl.exceptions import ConfigError
from axolotl.integrations.base import BaseOptimizerFactory
from axolotl.utils.optimizers.groups import Groups, is_hidden_matrix, param_groups_of, split_groups
from axolotl.utils.optimizers.parameterwise import run_closure


class MatrixOptimizer(Optimizer):
    """One optimizer for groups with `is_matrix`, AdamW for the others.

    Both work on the groups and the state of this object, so that it saves and loads like any other.

    Args:
        groups: param groups, each with `is_matrix`, `lr` and `weight_decay`.
        matrix_cls: optimizer of two-dimensional parameters.
        matrix_kwargs: its arguments.
        adamw_kwargs: arguments of AdamW.
        lr: learning rate of the run, which some schedules read from the defaults.
    """

    def __init__(
        self,
        groups: Groups,
        matrix_cls: type[Optimizer],
        matrix_kwargs: dict[str, Any],
        adamw_kwargs: dict[str, Any],
        lr: float = 1e-3,
    ):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self._parts: list[tuple[bool, Optimizer]] = []
        for is_matrix, cls, kwargs in ((True, matrix_cls, matrix_kwargs), (False, AdamW, adamw_kwargs)):
            own = self._groups_of(is_matrix)
            if own:
                # Fills in the defaults of `cls` in our groups, which it shares.
                self._parts.append((is_matrix, cls(own, **kwargs)))

    def _groups_of(self, is_matrix: bool) -> Groups:
        return [group for group in self.param_groups if group["is_matrix"] is is_matrix]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Returns what the closure returned."""
        loss = run_closure(closure)
        for is_matrix, optimizer in self._parts:
            # Loading a state replaces both, so that they are handed over at each step.
            optimizer.param_groups = self._groups_of(is_matrix)
            optimizer.state = self.state
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state.

        Raises:
            ValueError: it is that of another optimizer.
        """
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            lacks = sorted(set(own) - set(saved))
            if lacks or own["is_matrix"] is not saved["is_matrix"]:
                raise ValueError(f"its groups are those of another optimizer: {', '.join(lacks) or 'other matrices'}")
        super().load_state_dict(state_dict)


class MatrixFactory(BaseOptimizerFactory):
    """Creates a `MatrixOptimizer`: hidden matrices for `matrix_cls`, the rest for AdamW."""

    def __call__(
        self,
        opt_model: nn.Module,
        training_args: Any,
        *,
        lr: float,
        weight_decay: float,
        matrix_cls: type[Optimizer],
        matrix_lr: float | None = None,
        matrix_kwargs: dict[str, Any] | None = None,
        adamw_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> Optimizer:
        """Create the optimizer.

        Args:
            opt_model: the model.
            training_args: its `embedding_lr`, `embedding_lr_scale` and `lr_groups` are read.
            lr: learning rate.
            weight_decay: of parameters that decay.
            matrix_cls: optimizer of the hidden matrices.
            matrix_lr: learning rate of the hidden matrices that no group of `lr_groups` claims; `lr` when None.
            matrix_kwargs: arguments of `matrix_cls`.
            adamw_kwargs: arguments of AdamW.

        Raises:
            ConfigError: no hidden matrix is trained.
        """
        groups = param_groups_of(opt_model, training_args, lr, weight_decay)
        groups = split_groups(groups, is_hidden_matrix(opt_model), lambda is_matrix: {"is_matrix": is_matrix})
        if not any(group["is_matrix"] for group in groups):
            raise ConfigError(
                f"`optimizer: {training_args.alternate_optimizer}` updates weight matrices of hidden layers, and none of them is "
                "trained. Choose another optimizer, such as `adamw_torch_fused`."
            )
        for group in groups:
            if matrix_lr is not None and group["is_matrix"] and group["name"] == "parameters":
                group["lr"] = matrix_lr
        return MatrixOptimizer(groups, matrix_cls, matrix_kwargs or {}, adamw_kwargs or {}, lr=lr)


def whole(tensor: Tensor) -> Tensor:
    """The whole matrix of a sharded tensor; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(matrix: Tensor, like: Tensor) -> Tensor:
    """`matrix`, the same on all ranks, sharded like `like`."""
    if not isinstance(like, DTensor):
        return matrix
    return distribute_tensor(matrix, like.device_mesh, like.placements, src_data_rank=None)


def check_matrices(params: Groups) -> None:
    """Raise ValueError for a parameter that is no matrix."""
    for group in params:
        for parameter in group["params"]:
            if parameter.ndim != 2:
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is no matrix")
