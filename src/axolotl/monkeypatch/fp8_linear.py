"""Training of all weights with matmuls in 8-bit floating point: `fp8: true` without an adapter.

The linear layers of the decoder layers multiply in fp8 while they train; embeddings, norms, attention and the output head stay
as they are. A layer changes its class and nothing else: what is saved, resumed, sharded and merged are the weights that were
loaded, in their dtype.
"""

from __future__ import annotations

from torch import nn

from axolotl.exceptions import ConfigError
from axolotl.kernels.fp8 import MULTIPLE
from axolotl.kernels.fp8_linear import Fp8TrainingLinear
from axolotl.monkeypatch.lora_kernels import get_layers
from axolotl.utils.dict import DictDefault, note_choice

ROUTERS = frozenset({"gate", "router"})
"""Names of layers that choose experts; the choice is discrete, and a token near a border would change sides by rounding."""


def _why_not(name: str, linear: nn.Linear, filter_fqns: list[str]) -> str | None:
    """Why a linear layer stays as it is, or None."""
    if any(part in name for part in filter_fqns):
        return "named in `filter_fqns`"
    if name.rpartition(".")[2] in ROUTERS:
        return "a router"
    if type(linear) not in (nn.Linear, Fp8TrainingLinear) or not linear.weight.is_floating_point():
        return "not a plain linear layer"
    if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
        return f"a size that is no multiple of {MULTIPLE}"
    return None


def apply_fp8_training(model: nn.Module, cfg: DictDefault) -> None:
    """Let the linear layers of the decoder layers train in fp8.

    Args:
        model: a model of transformers whose weights are trained. Changed in place: the class of the layers.
        cfg: the config. Reads `fp8_config`; notes how many layers changed, and why the others did not.

    Raises:
        ConfigError: no layer of the model can multiply in fp8, or an entry of `filter_fqns` names none.
    """
    options = cfg.fp8_config or DictDefault()
    recipe: str = options.recipe or "tensorwise"
    filter_fqns: list[str] = list(options.filter_fqns or [])
    inside = {id(module) for layer in get_layers(model) for module in layer.modules()}
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside
    }
    for part in filter_fqns:
        if not any(part in name for name in linears):
            raise ConfigError(
                f"`fp8_config: {{filter_fqns: [{part}]}}` names no linear layer of the model. They are called like "
                f"{', '.join(f'`{name}`' for name in list(linears)[:7])}. Remove it, or write a part of such a name."
            )
    done, kept = 0, dict[str, int]()
    for name, linear in linears.items():
        reason = _why_not(name, linear, filter_fqns)
        if reason:
            kept[reason] = kept.get(reason, 0) + 1
            continue
        linear.__class__ = Fp8TrainingLinear
        linear.recipe = recipe
        done += 1
    if not done:
        raise ConfigError(
            f"`fp8: true` multiplies with the linear layers of decoder layers in fp8, and none of this model can: "
            f"{_count(kept) or 'it has none'}. Remove `fp8`."
        )
    others = f"; of the others, {_count(kept)}" if kept else ""
    note_choice(
        cfg,
        "fp8",
        f"{done} linear layers, {recipe}",
        f"they multiply in fp8 while they train; evaluation, embeddings and the output head stay in bf16{others}",
    )


def _count(kept: dict[str, int]) -> str:
    return ", ".join(f"{number} {'is' if number == 1 else 'are'} left alone ({why})" for why, number in kept.items())
