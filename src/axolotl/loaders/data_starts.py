"""Starts of LoRA that look at the training rows first: EVA, CorDA and LoRA-GA.

In: a model with a LoRA adapter that does nothing yet (B = 0), and prepared rows. Out: the same function of the model, with
other matrices A and B. Rows are drawn by the seed and run one by one, so that packing, batch sizes and the number of
processes change nothing; what the first process finds is what all of them use.

- EVA (https://arxiv.org/abs/2410.07170): A holds the directions in which the inputs of a layer vary most, and layers
  whose inputs vary in more directions get more of the ranks. B stays zero, the base as it is.
- CorDA (https://arxiv.org/abs/2406.05223, instruction-previewed mode): the part of the base weight that matters most for
  these inputs moves into the adapter.
- LoRA-GA (https://arxiv.org/abs/2407.05000, algorithm 1): B·A starts along the gradient of the base weight, so that the first
  step of the adapter is near the first step of full training. The base gives way by as much.

Statistics of a layer have the size of its input squared, or of its weight. They are taken for a few layers at a time, within
`STATISTICS_BYTES`; each group of layers costs another pass over the rows.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from axolotl.exceptions import ConfigError
from axolotl.loaders.adapter_init import ADAPTER, CONFIG, PEFT_PREFIX, lora_layers, start_from
from axolotl.utils.distributed import compute_and_broadcast
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

DATA_STARTS = ("eva", "corda", "lora_ga")
NUM_ROWS = 128
MAX_TOKENS = 2048  # of a row
STATISTICS_BYTES = 4 * 2**30
EXACT_SIZE = 1024  # of a matrix that is decomposed in full
EVA_RHO = 2.0  # a layer gets at most this times its rank
LORA_GA_GAMMA = 16.0

# Layer -> (A0, B0): float32, on the CPU.
Starts = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class DataStart:
    """What a data-driven start is given.

    Args:
        method: one of `DATA_STARTS`.
        rows: prepared rows with `input_ids` and `labels`; None to leave the adapter as it is.
        seed: which rows are drawn.
        checkpoint: a checkpoint that brings its start along, whose ranks are taken over.
    """

    method: str
    rows: Sequence[Mapping[str, Any]] | None
    seed: int = 42
    checkpoint: Path | None = None


def take_ranks(config: LoraConfig, start: DataStart) -> None:
    """Give `config` the ranks and scales that EVA chose for the adapter of a checkpoint. The others choose none."""
    if start.method != "eva" or start.checkpoint is None:
        return
    written = json.loads((start.checkpoint / CONFIG).read_text(encoding="utf-8"))
    config.rank_pattern, config.alpha_pattern = written["rank_pattern"], written["alpha_pattern"]


def start_from_data(
    model: PeftModel, start: DataStart, adapt: Callable[[nn.Module, LoraConfig], PeftModel]
) -> PeftModel:
    """`model` with its adapter started from rows.

    Args:
        model: freshly adapted, with B = 0.
        start: the method and the rows.
        adapt: puts a new adapter on a plain model, for ranks that change.

    Returns:
        The model to train, which EVA adapts anew.

    Raises:
        ConfigError: no layer can be started so, or the rank is too large for a layer.
    """
    layers = {name: module for name, module in lora_layers(model) if _is_linear(module.get_base_layer())}
    if not layers:
        raise ConfigError(
            f"`peft_init_lora_weights: {start.method}` starts linear layers, and LoRA is on none. Use another start."
        )
    rows = draw_rows(start)
    LOG.info(f"`peft_init_lora_weights: {start.method}`: looking at {len(rows)} rows for {len(layers)} layers.")
    with torch.random.fork_rng():  # dropout of the model, while gradients are taken
        torch.manual_seed(start.seed)
        if start.method == "eva":
            return _start_eva(model, layers, rows, adapt)
        found = _corda(model, layers, rows) if start.method == "corda" else _lora_ga(model, layers, rows)
    starts: Starts = compute_and_broadcast(lambda: found)
    _say_missing(start.method, layers, starts)
    start_from(model, starts)
    return model


def draw_rows(start: DataStart) -> list[dict[str, torch.Tensor]]:
    """`NUM_ROWS` rows with supervised tokens as batches of one, the same for the same seed, cut to `MAX_TOKENS`."""
    rows = start.rows
    assert rows is not None
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(start.seed))
    drawn = []
    for index in order.tolist():
        row = rows[index]
        batch = {
            key: torch.as_tensor(row[key])[None, :MAX_TOKENS]
            for key in ("input_ids", "labels", "position_ids")
            if key in row
        }
        if (batch["labels"][:, 1:] != -100).any():
            drawn.append(batch)
        if len(drawn) == NUM_ROWS:
            break
    if not drawn:
        raise ConfigError(
            f"`peft_init_lora_weights: {start.method}` starts from supervised tokens, and no row has any. Use another start."
        )
    return drawn


def _is_linear(layer: nn.Module) -> bool:
    """A layer that multiplies by one matrix, quantized ones too."""
    return isinstance(layer, nn.Linear | Conv1D) and layer.weight is not None


def _say_missing(method: str, layers: dict[str, Any], found: Mapping[str, Any]) -> None:
    missing = [name.removeprefix(PEFT_PREFIX) for name in layers if name not in found]
    if missing:
        LOG.warning(
            f"`peft_init_lora_weights: {method}`: no token of the rows reached {len(missing)} layers, such as `{missing[0]}`, "
            "which start as usual."
        )


# --- statistics -------------------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """Sums over the inputs x of a layer.

    Args:
        second: of x xᵀ, float32 (in, in).
        first: of x, float32 (in,).
        count: number of inputs.
    """

    second: torch.Tensor
    first: torch.Tensor
    count: int = 0

    def add(self, x_NI: torch.Tensor) -> None:
        self.second.addmm_(x_NI.T, x_NI)
        self.first += x_NI.sum(dim=0)
        self.count += len(x_NI)


@contextmanager
def _hooked(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _groups(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names in order, in groups that take at most `STATISTICS_BYTES`, at least one each."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > STATISTICS_BYTES:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


def _shared_inputs(model: PeftModel, layers: dict[str, Any], batch: dict[str, torch.Tensor]) -> dict[str, str]:
    """Layer -> the first layer that is given the very same tensor (queries, keys and values; gate and up)."""
    first_of: dict[str, str] = {}
    last: list[Any] = [None, ""]  # tensor, layer

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            if args[0] is not last[0]:
                last[:] = args[0], name
            first_of.setdefault(name, last[1])

        return hook

    hooks = [module.get_base_layer().register_forward_pre_hook(look(name)) for name, module in layers.items()]
    with _hooked(hooks):
        model(**_inputs(model, batch))
    return first_of


def _inputs(model: PeftModel, batch: dict[str, torch.Tensor], *, labels: bool = False) -> dict[str, Any]:
    device = model.get_input_embeddings().weight.device
    return {key: value.to(device) for key, value in batch.items() if labels or key != "labels"} | {"use_cache": False}


@torch.no_grad()
def measure_inputs(
    model: PeftModel,
    layers: dict[str, Any],
    rows: list[dict[str, torch.Tensor]],
    prepare: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor],
) -> Iterator[tuple[list[str], Moments]]:
    """The moments of the inputs of each layer, for layers with the same input together.

    Args:
        prepare: (inputs (N, in) float32 of one row, the row) -> the inputs that count.
    """
    with model.disable_adapter(), _mode(model, training=False):
        first_of = _shared_inputs(model, layers, rows[0])
        for batch in rows[1:] if len(first_of) < len(layers) else ():  # experts that the first row did not reach
            for name, first in _shared_inputs(model, layers, batch).items():
                first_of.setdefault(name, first_of.get(first, first))
        owners = dict.fromkeys(first_of.values())
        sizes = {name: 4 * layers[name].in_features ** 2 for name in owners}
        for group in _groups(sizes):
            moments: dict[str, Moments] = {}
            current: dict[str, torch.Tensor] = {}

            def add(name: str, moments=moments, current=current) -> Callable[..., None]:
                def hook(module: nn.Module, args: tuple) -> None:
                    x_NI = prepare(args[0].detach().reshape(-1, args[0].shape[-1]).float(), current)
                    if name not in moments:
                        width = x_NI.shape[1]
                        moments[name] = Moments(x_NI.new_zeros(width, width), x_NI.new_zeros(width))
                    moments[name].add(x_NI)

                return hook

            hooks = [layers[name].get_base_layer().register_forward_pre_hook(add(name)) for name in group]
            with _hooked(hooks):
                for batch in rows:
                    current.update(batch)
                    model(**_inputs(model, batch))
            for owner, found in moments.items():
                if found.count:
                    yield [name for name, first in first_of.items() if first == owner], found


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def _weight(module: Any) -> torch.Tensor:
    """The base weight as (out, in), float32."""
    weight = module.get_base_layer().weight.detach().float()
    return weight.T if module.fan_in_fan_out else weight


def measure_gradients(
    model: PeftModel, layers: dict[str, Any], rows: list[dict[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Layer -> gradient (out, in) float32 of the mean token loss of `rows` by its base weight."""
    num_tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in rows)
    asked = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in asked:
        parameter.requires_grad_(False)
    weights = {name: module.get_base_layer().weight for name, module in layers.items()}
    try:
        with model.disable_adapter(), _mode(model, training=True), torch.enable_grad():
            for group in _groups({name: 4 * weight.numel() for name, weight in weights.items()}):
                sums: dict[str, torch.Tensor] = {}

                def take(name: str, sums=sums) -> Callable[[torch.Tensor], None]:
                    def hook(parameter: torch.Tensor) -> None:
                        assert parameter.grad is not None
                        gradient = parameter.grad.float()
                        sums[name] = sums[name] + gradient if name in sums else gradient
                        parameter.grad = None

                    return hook

                hooks = [
                    weights[name].requires_grad_().register_post_accumulate_grad_hook(take(name)) for name in group
                ]
                try:
                    with _hooked(hooks):
                        for batch in rows:
                            share = int((batch["labels"][:, 1:] != -100).sum()) / num_tokens
                            (model(**_inputs(model, batch, labels=True)).loss * share).backward()
                finally:
                    for name in group:
                        weights[name].requires_grad_(False)
                for name, gradient in sums.items():
                    yield name, gradient.T if layers[name].fan_in_fan_out else gradient
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


# --- the three methods ------------------------------------------------------------------------------------------------


def _supervised(x_NI: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Inputs at supervised tokens. An expert that is given some of the tokens counts all of them."""
    kept = batch["labels"][0] != -100
    return x_NI[kept.to(x_NI.device)] if len(kept) == len(x_NI) else x_NI


def _normed(x_NI: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Inputs of a row whose largest value is 1, so that no row outweighs the others."""
    return x_NI / x_NI.abs().max().clamp(min=torch.finfo(x_NI.dtype).tiny) if len(x_NI) else x_NI


def leading_directions(matrix_MN: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular vectors and values: (left (m, number), values (number,), right (number, n)).

    Exact for small matrices. Large ones go through subspace iterations from the same random directions each time (Halko et
    al., https://arxiv.org/abs/0909.4061), which take seconds instead of minutes.
    """
    if min(matrix_MN.shape) <= max(EXACT_SIZE, 2 * number):
        left, values, right = torch.linalg.svd(matrix_MN, full_matrices=False)
        return left[:, :number], values[:number], right[:number]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix_MN, q=2 * number, niter=8)
    return left[:, :number], values[:number], right.T[:number]


@torch.no_grad()
def _start_eva(
    model: PeftModel,
    layers: dict[str, Any],
    rows: list[dict[str, torch.Tensor]],
    adapt: Callable[[nn.Module, LoraConfig], PeftModel],
) -> PeftModel:
    config = model.peft_config[ADAPTER]
    assert isinstance(config, LoraConfig)
    ranks = {name: module.r[ADAPTER] for name, module in layers.items()}
    scales = {name: module.scaling[ADAPTER] for name, module in layers.items()}
    found: dict[
        str, tuple[torch.Tensor, torch.Tensor]
    ] = {}  # layer -> directions as rows, their shares of the variance
    for names, moments in measure_inputs(model, layers, rows, _supervised):
        number = min(max(math.floor(ranks[name] * EVA_RHO + 0.5) for name in names), moments.second.shape[0])
        found.update(dict.fromkeys(names, principal_directions(moments, number)))
    found = compute_and_broadcast(lambda: found)
    _say_missing("eva", layers, found)
    chosen = ranks | share_ranks({name: shares for name, (_, shares) in found.items()}, {n: ranks[n] for n in found})
    config = copy.deepcopy(config)
    # The scale of a layer stays what it was: alpha / r, or alpha / sqrt(r).
    power = 0.5 if config.use_rslora else 1.0
    config.rank_pattern = {name.removeprefix(PEFT_PREFIX): rank for name, rank in chosen.items() if rank != config.r}
    alphas = {name.removeprefix(PEFT_PREFIX): scales[name] * rank**power for name, rank in chosen.items()}
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if not math.isclose(alpha, config.lora_alpha)}
    adapted = adapt(model.unload(), config)
    for name, module in lora_layers(adapted):
        if name in found:
            matrix = module.lora_A[ADAPTER].weight
            matrix.copy_(found[name][0][: len(matrix)])
    return adapted


def principal_directions(moments: Moments, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal directions of the inputs.

    Returns:
        (directions of length 1, (number, in); their shares of the variance, falling (number,)): float32, on the CPU.
    """
    mean = moments.first / moments.count
    covariance = moments.second / moments.count - torch.outer(mean, mean)
    _, values, rows = leading_directions(covariance, number)
    shares = values / covariance.trace().clamp(min=torch.finfo(values.dtype).tiny)
    # Of the two signs of a direction, the one whose largest entry is positive.
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return (rows * largest.sign()).contiguous().cpu(), shares.contiguous().cpu()


def share_ranks(shares: dict[str, torch.Tensor], ranks: dict[str, int]) -> dict[str, int]:
    """Deal out the sum of `ranks` to the directions with the largest shares of the variance of their layers.

    Every layer keeps at least one direction, so that the adapter has the layers that were asked for.
    """
    candidates = [
        (index > 0, -share, name)
        for name, values in shares.items()
        for index, share in enumerate(values[: math.floor(ranks[name] * EVA_RHO + 0.5)].tolist())
    ]
    chosen = dict.fromkeys(shares, 0)
    for _, _, name in sorted(candidates)[: sum(ranks.values())]:
        chosen[name] += 1
    return chosen


@torch.no_grad()
def _corda(model: PeftModel, layers: dict[str, Any], rows: list[dict[str, torch.Tensor]]) -> Starts:
    starts: Starts = {}
    for names, moments in measure_inputs(model, layers, rows, _normed):
        damped, inverse = damped_inverse(moments.second / len(rows))
        for name in names:
            module, rank = layers[name], layers[name].r[ADAPTER]
            weight_OI = _weight(module)
            _check_rank(name, rank, weight_OI, rank)
            left_OR, values, right_RI = leading_directions(weight_OI @ damped, rank)
            root = (values / module.scaling[ADAPTER]).sqrt()
            starts[name] = (root[:, None] * (right_RI @ inverse)).cpu(), (left_OR * root).cpu()
    return starts


def damped_inverse(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`covariance` with its diagonal raised until it can be inverted to an error below 0.05, and the inverse."""
    identity = torch.eye(len(covariance), device=covariance.device)
    damp = 0.01
    while True:
        damped = covariance + damp * covariance.diagonal().mean() * identity
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < 0.05:
            return damped, inverse
        damp *= 2


def _lora_ga(model: PeftModel, layers: dict[str, Any], rows: list[dict[str, torch.Tensor]]) -> Starts:
    starts: Starts = {}
    for name, gradient_OI in measure_gradients(model, layers, rows):
        rank = layers[name].r[ADAPTER]
        _check_rank(name, rank, gradient_OI, 2 * rank)
        left, _, right = leading_directions(gradient_OI, 2 * rank)
        scale = gradient_OI.shape[0] ** 0.25 / math.sqrt(LORA_GA_GAMMA)
        starts[name] = (scale * right[:rank]).cpu(), (scale * left[:, rank:]).cpu()
    return starts


def _check_rank(name: str, rank: int, weight_OI: torch.Tensor, needed: int) -> None:
    if needed > min(weight_OI.shape):
        raise ConfigError(
            f"`lora_r: {rank}` is too large for the layer `{name.removeprefix(PEFT_PREFIX)}` with {weight_OI.shape[0]} x "
            f"{weight_OI.shape[1]} weights: its start needs {needed} directions. Lower `lora_r`, or give the layer less in "
            "`lora_rank_pattern`."
        )
