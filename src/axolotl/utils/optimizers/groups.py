"""Param groups: which parameters learn at which rate and which of them decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

EMBEDDING_NAMES = ("embed_tokens", "lm_head")


def build_param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    decay_names: set[str],
    learning_rate: float,
    weight_decay: float,
    embedding_lr: float | None = None,
    embedding_lr_scale: float | None = None,
    lr_groups: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups; a parameter goes to the first group that claims it.

    First the `lr_groups`, in order (a module name that occurs in the parameter's name claims it); then, if a rate for
    them is given, embeddings and output head, without decay; then the parameters that decay; then the others.

    Args:
        named_parameters: of the model.
        decay_names: names of the parameters to which weight decay applies.
        learning_rate: of parameters that no group claims.
        weight_decay: of the parameters in `decay_names`.
        embedding_lr: learning rate of embeddings and head.
        embedding_lr_scale: the same as a factor; `embedding_lr` wins.
        lr_groups: `{name, modules, lr}` each.

    Returns:
        Groups without those that are empty. Each has `name`, `params`, `lr`, `weight_decay`.
    """
    own_embedding_lr = embedding_lr is not None or embedding_lr_scale is not None
    embedding_rate = embedding_lr if embedding_lr is not None else learning_rate * (embedding_lr_scale or 1.0)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}

    def add(name: str, decays: bool, rate: float, parameter: nn.Parameter) -> None:
        group = groups.setdefault(
            (name, decays),
            {"name": name, "params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)

    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        claimed = next((g for g in lr_groups or () if any(module in name for module in g["modules"])), None)
        if claimed is not None:
            add(claimed["name"], name in decay_names, float(claimed["lr"]), parameter)
        elif own_embedding_lr and any(part in name for part in EMBEDDING_NAMES):
            add("embeddings", False, embedding_rate, parameter)
        else:
            add("parameters", name in decay_names, learning_rate, parameter)
    return list(groups.values())
