"""What the size of an optimizer's state depends on, read from the config and the model: for `axolotl.utils.forecast_states`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from axolotl.utils.dict import DictDefault
from axolotl.utils.forecast_states import Weight
from axolotl.utils.optimizers.groups import is_hidden_matrix, target_parameters
from axolotl.utils.optimizers.options import read_optim_args
from axolotl.utils.optimizers.table import OPTIMIZERS, read_any_name, read_projection

DION_KEYS = ("dion_rank_fraction", "dion_rank_multiple_of")


def read_state_options(cfg: DictDefault) -> dict[str, Any]:
    """The arguments of the configured optimizer that are written or its row's own. Its package need not be installed.

    Raises:
        ConfigError: `optim_args` is not of the form key=value, or a key of the projection cannot be as written.
    """
    row = OPTIMIZERS.get(read_any_name(cfg))
    if row is None:
        return read_optim_args(cfg)
    keys = [key for key in DION_KEYS if row is OPTIMIZERS["dion"] and cfg[key] is not None]
    dion = {key.removeprefix("dion_"): cfg[key] for key in keys}
    return {**row.fixed, **read_projection(cfg), **dion, **read_optim_args(cfg)}


def trained_weights(cfg: DictDefault, model: nn.Module, item: int | None = None) -> tuple[Weight, ...]:
    """The weights of a model that the configured optimizer will train, equal ones together.

    Args:
        cfg: the config.
        model: as it will be trained; its weights may be on the meta device.
        item: bytes of an element; None for what they have.

    Raises:
        ConfigError: the optimizer projects gradients, and `optim_target_modules` names no layer that is trained.
    """
    name = read_any_name(cfg)
    row = OPTIMIZERS.get(name)
    projects = row is not None and row.via in ("galore", "apollo")
    projected = target_parameters(model, cfg.optim_target_modules, name) if projects else set()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    is_hidden = is_hidden_matrix(model)
    found: Counter[Weight] = Counter()
    for parameter in model.parameters():
        if parameter.requires_grad:
            weight = Weight(
                shape=tuple(parameter.shape),
                item=item or parameter.element_size(),
                embedding=id(parameter) in embeddings,
                hidden=is_hidden(parameter),
                projected=id(parameter) in projected,
            )
            found[weight] += 1
    return tuple(Weight(**{**vars(weight), "count": count}) for weight, count in found.items())
