"""Param groups: which parameters learn at which rate, which of them decay, and which are matrices of hidden layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import check_target_module_exists

from axolotl.exceptions import ConfigError
from axolotl.integrations.base import BaseOptimizerFactory
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

EMBEDDING_NAMES = ("embed_tokens", "lm_head")

Groups = list[dict[str, Any]]


def build_param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    decay_names: set[str],
    learning_rate: float,
    weight_decay: float,
    embedding_lr: float | None = None,
    embedding_lr_scale: float | None = None,
    lr_groups: Sequence[Mapping[str, Any]] | None = None,
    embeddings: Set[int] = frozenset(),
) -> Groups:
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
        embeddings: `id` of parameters of embeddings and head whose names do not say so, such as GPT-2's `wte`.

    Returns:
        Groups without those that are empty. Each has `name`, `params`, `lr`, `weight_decay`. Those at `learning_rate` come
        first: the rate of the first group is the one that is logged.
    """
    own_embedding_lr = embedding_lr is not None or embedding_lr_scale is not None
    scale = 1.0 if embedding_lr_scale is None else embedding_lr_scale
    embedding_rate = embedding_lr if embedding_lr is not None else learning_rate * scale
    lr_groups = lr_groups or ()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}

    def add(place: int, name: str, decays: bool, rate: float, parameter: nn.Parameter) -> None:
        group = groups.setdefault(
            (place, decays),
            {"name": name, "params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)

    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        place = next((n for n, g in enumerate(lr_groups) if any(module in name for module in g["modules"])), None)
        if place is not None:
            claimed = lr_groups[place]
            add(2 + place, claimed["name"], name in decay_names, float(claimed["lr"]), parameter)
        elif own_embedding_lr and (id(parameter) in embeddings or any(part in name for part in EMBEDDING_NAMES)):
            add(1, "embeddings", False, embedding_rate, parameter)
        else:
            add(0, "parameters", name in decay_names, learning_rate, parameter)
    used = {place for place, _ in groups}
    if own_embedding_lr and 1 not in used:
        key = "embedding_lr" if embedding_lr is not None else "embedding_lr_scale"
        LOG.warning(
            f"`{key}` has no effect: neither embeddings nor output head are trained, or `lr_groups` took them. With an adapter, write "
            "`lora_modules_to_save: [embed_tokens, lm_head]` to train them."
        )
    for place, group in enumerate(lr_groups, 2):
        if place not in used:
            LOG.warning(
                f"`lr_groups`: the group `{group['name']}` is empty. No weight that is trained has one of {', '.join(group['modules'])} "
                "in its name, or an earlier group took it."
            )
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0][0])]


def param_groups_of(model: nn.Module, args: Any, learning_rate: float, weight_decay: float) -> Groups:
    """`build_param_groups` of a model, with the groups that the training arguments ask for.

    Parameters on different device meshes (expert parallelism) are put into different groups: one fused or foreach kernel
    cannot span two meshes.
    """
    groups = build_param_groups(
        model.named_parameters(),
        decay_names=set(BaseOptimizerFactory.get_decay_parameter_names(model)),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        embedding_lr=args.embedding_lr,
        embedding_lr_scale=args.embedding_lr_scale,
        lr_groups=args.lr_groups,
        embeddings=input_and_output_embeddings(model),
    )
    return split_groups(groups, lambda p: p.device_mesh if isinstance(p, DTensor) else None)


def loraplus_groups(
    model: nn.Module, groups: Groups, *, learning_rate: float, ratio: float, embedding_lr: float
) -> Groups:
    """LoRA+: let B learn faster than A (Hayou et al., https://arxiv.org/abs/2402.12354).

    As in the authors' code, vectors (biases, the magnitudes of DoRA) learn at the rate of B. Layers that are trained in full
    beside LoRA keep the rate of their group.

    Args:
        model: with LoRA.
        groups: its groups.
        learning_rate: of A.
        ratio: rate of B over that of A.
        embedding_lr: rate of LoRA on embeddings.
    """
    rates = {"A": {}, "B": {"lr": learning_rate * ratio}, "embedding": {"lr": embedding_lr}}
    kinds = {}
    for name, parameter in model.named_parameters():
        is_b = "lora_B" in name or parameter.ndim == 1
        kinds[id(parameter)] = "embedding" if "lora_embedding_" in name else "B" if is_b else "A"
    return split_groups(groups, lambda parameter: kinds[id(parameter)], lambda kind: rates[kind])


def split_groups(
    groups: Groups, kind: Callable[[nn.Parameter], Any], extra: Callable[[Any], dict[str, Any]] = lambda kind: {}
) -> Groups:
    """Divide each group by a property of its parameters.

    Args:
        groups: the groups.
        kind: parameter -> property, hashable.
        extra: property -> further entries of the groups that have it.

    Returns:
        New groups in the same order, without empty ones.
    """
    found: Groups = []
    for group in groups:
        parts: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            parts[kind(parameter)].append(parameter)
        found += [{**group, "params": params, **extra(key)} for key, params in parts.items()]
    return found


def embedding_parameters(model: nn.Module) -> set[int]:
    """`id` of each parameter of embeddings and of the output head, and of adapters on them."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    modules += [module for name, module in model.named_modules() if any(part in name for part in EMBEDDING_NAMES)]
    return {id(parameter) for module in modules for parameter in module.parameters()}


def input_and_output_embeddings(model: nn.Module) -> set[int]:
    """`id` of each parameter of the embedding of tokens and of the output head, however the model names them."""
    inputs = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return head_parameters(model) | (
        {id(parameter) for parameter in inputs.parameters()} if inputs is not None else set()
    )


def head_parameters(model: nn.Module) -> set[int]:
    """`id` of each parameter of the output head, which is the embedding where both are tied."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {id(parameter) for parameter in head.parameters()} if head is not None else set()


def is_hidden_matrix(model: nn.Module) -> Callable[[nn.Parameter], bool]:
    """A test for the weight matrices of hidden layers: two dimensions, and neither embedding nor output head."""
    outside = embedding_parameters(model) | head_parameters(model)
    return lambda parameter: parameter.ndim == 2 and id(parameter) not in outside


def target_parameters(model: nn.Module, target_modules: str | list[str] | None, optimizer: str) -> set[int]:
    """`id` of each trainable weight of the linear layers that `optim_target_modules` names.

    Args:
        model: the model.
        target_modules: parts of module names or regular expressions; one expression; or `all_linear`.
        optimizer: its name, for errors.

    Raises:
        ConfigError: not set, or no such layer is trained.
    """
    if target_modules is None:
        raise ConfigError(
            f"`optimizer: {optimizer}` needs `optim_target_modules`: the layers whose gradients it projects. Write "
            "`optim_target_modules: all_linear`, or a list such as `[self_attn, mlp]`."
        )
    every = isinstance(target_modules, str) and target_modules.replace("-", "_") == "all_linear"
    found = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and (every or check_target_module_exists(target_modules, name))
    }
    if not found:
        raise ConfigError(
            f"`optim_target_modules: {target_modules}` names no linear layer whose weights are trained, which `optimizer: "
            f"{optimizer}` needs. Write parts of module names, such as `[self_attn, mlp]`, or `all_linear`; with an adapter, "
            "whose base weights are frozen, choose another optimizer."
        )
    return found
