"""What would make a run smaller: changes of its config, each with its forecast and with what it costs.

A proposal is a key to write and the `Run` that it would make. `remedies` forecasts all of them and puts the best one first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from axolotl.utils.forecast import CONTEXT_BYTES, Forecast, Run, forecast, optimizer_bytes, weight_bytes
from axolotl.utils.forecast_states import Weight

# What a change costs, as a share of the time of a step. Rough: only the order is used.
HALVED_BATCH = 0.03  # kernels on fewer rows, as long as there are enough
FEW_TOKENS = 2048  # of a micro-batch; below, a GPU is not full
OFFLOADED_INPUTS = 0.02  # copies beside the computation
OFFLOADED_WEIGHTS = 0.5  # copies of all frozen weights, which take longer than the computation of short batches
TILED_MLP = 0.15  # the MLP's forward once more
FOUR_BITS = 0.05  # dense copies of weights

CHECKPOINTING = "gradient_checkpointing: true"
OFFLOADING = f"{CHECKPOINTING}, activation_offloading: true"
PLAIN_OPTIMIZER = "adamw_torch_fused"
EXACT, OTHER = "same result", "another result"


@dataclass(frozen=True)
class Remedy:
    """A change of the config, what it would need then, and how much longer a step would take, as a share."""

    change: str
    effect: str
    forecast: Forecast
    slowdown: float = 0.0


@dataclass(frozen=True)
class Proposal:
    """A change of the config and the run that it makes. Slowdown and effect as in `Remedy`."""

    change: str
    run: Run
    slowdown: float = 0.0
    effect: str = EXACT


def remedies(run: Run, limit_bytes: float, *, micro_batch_size: int, can_quantize: bool) -> list[Remedy]:
    """Changes that make a run smaller: first those that fit, then those that keep what is learnt, then the least slowdown.

    Args:
        run: the run as it is.
        limit_bytes: memory of the GPU.
        micro_batch_size: rows of a micro-batch; halving it doubles the accumulation steps and leaves the loss as it is.
        can_quantize: whether the base weights are frozen and not yet quantized.
    """
    proposals = [
        *checkpointing(run, limit_bytes),
        *offloading(run, limit_bytes),
        *other_kernels(run),
        *smaller_batches(run, micro_batch_size),
        *other_results(run, can_quantize),
    ]
    found = [Remedy(each.change, each.effect, forecast(each.run), each.slowdown) for each in proposals]
    now = forecast(run).total

    def rank(remedy: Remedy) -> tuple[bool, bool, float, float]:
        needed = remedy.forecast.total
        fits = needed <= limit_bytes
        return not fits, remedy.effect != EXACT, remedy.slowdown if fits else needed, needed

    # The context of the process is there in any case.
    worth = 0.99 * (now - CONTEXT_BYTES) + CONTEXT_BYTES
    return sorted((remedy for remedy in found if remedy.forecast.total < worth), key=rank)


def checkpointing(run: Run, limit_bytes: float) -> Iterator[Proposal]:
    """Gradient checkpointing of all layers, and the smallest part of it that fits `limit_bytes`."""
    if run.checkpointing:
        return
    whole, checkpointed = recomputation(run), _checkpointed(run)
    yield Proposal(CHECKPOINTING, checkpointed, whole)
    for every in (8, 4, 3, 2):
        part = dataclasses.replace(checkpointed, checkpoint_every=every)
        if every < run.num_layers and forecast(part).total <= limit_bytes:
            change = f"{CHECKPOINTING}, gradient_checkpointing_kwargs: {{every_n_layers: {every}}}"
            yield Proposal(change, part, whole / every)
            break
    if not run.compiled and run.attention_kind == "flash":
        # Inside a compiled layer the results of single operators are not seen.
        kept = dataclasses.replace(checkpointed, keeps_attention=True)
        yield Proposal(f"{CHECKPOINTING}, selective_checkpointing: true", kept, whole * 0.9)


def offloading(run: Run, limit_bytes: float) -> Iterator[Proposal]:
    """Kept inputs, and frozen weights, that wait in host memory."""
    slowdown = recomputation(run) + OFFLOADED_INPUTS
    if not run.offload and not run.offloads_by_default:
        yield Proposal(OFFLOADING, dataclasses.replace(run, checkpointing=True, offload=True), slowdown)
    loaded_whole = weight_bytes(run)[0] + CONTEXT_BYTES <= limit_bytes  # before its layers leave
    if run.is_adapter and not run.layers_on_host and run.weight_bits != 8 and loaded_whole:
        on_host = dataclasses.replace(_not_compiled(run), layers_on_host=True, checkpointing=True, offload=True)
        yield Proposal(f"{OFFLOADING}, layer_offloading: true", on_host, slowdown + OFFLOADED_WEIGHTS)


def other_kernels(run: Run) -> Iterator[Proposal]:
    """The same layers, computed in another way."""
    if run.mlp_tiles <= 1 and run.layer.active_experts == 1 and run.row_length > run.layer.hidden:
        tiles = math.ceil(run.row_length / run.layer.hidden)
        tiled = dataclasses.replace(_not_compiled(run), checkpointing=True, mlp_tiles=tiles)
        yield Proposal(f"{CHECKPOINTING}, tiled_mlp: true", tiled, recomputation(run) + TILED_MLP)
    if run.attention_kind == "eager":
        yield Proposal("flash_attention: true", dataclasses.replace(run, attention_kind="flash"))


def smaller_batches(run: Run, micro_batch_size: int) -> Iterator[Proposal]:
    """Micro-batches of half the rows, a quarter, and so on, with as many more accumulation steps."""
    size, cost = micro_batch_size, 0.0
    while size > 1:
        size = math.ceil(size / 2)
        smaller = dataclasses.replace(run, tokens=run.tokens * size // micro_batch_size)
        cost += HALVED_BATCH if smaller.tokens >= FEW_TOKENS else 10 * HALVED_BATCH
        change = f"micro_batch_size: {size}, gradient_accumulation_steps x {micro_batch_size // size}"
        yield from _with_checkpointing(Proposal(change, smaller, cost))


def other_results(run: Run, can_quantize: bool) -> Iterator[Proposal]:
    """Changes of what is learnt: the optimizer, the weights, what trains, the length of the rows."""
    small = dataclasses.replace(run, optimizer="adamw_8bit", optimizer_options={})
    if optimizer_bytes(run) - optimizer_bytes(small) > 0.01 * forecast(run).total:
        yield from _with_checkpointing(Proposal("optimizer: adamw_8bit", small, effect=OTHER))
    if can_quantize:
        small = dataclasses.replace(run, weight_bits=4)
        yield from _with_checkpointing(Proposal("adapter: qlora, load_in_4bit: true", small, FOUR_BITS, OTHER))
    if not run.is_adapter:
        beside = f"{CHECKPOINTING}, optimizer: {PLAIN_OPTIMIZER}" if _projects(run) else CHECKPOINTING
        yield Proposal(f"adapter: lora, {beside}", _as_adapter(run, 16), effect=OTHER)
        yield Proposal(f"adapter: qlora, load_in_4bit: true, {beside}", _as_adapter(run, 4), FOUR_BITS, OTHER)
    if run.row_length > 1024:
        half = dataclasses.replace(run, tokens=run.tokens // 2, row_length=run.row_length // 2)
        yield Proposal(f"sequence_len: {run.row_length // 2}", half, effect=OTHER)


def _projects(run: Run) -> bool:
    """Whether the optimizer projects gradients of whole weights, which adapters freeze."""
    return any(weight.projected for weight in run.trained)


def recomputation(run: Run) -> float:
    """Share of a step that the second forward of gradient checkpointing adds; 0 where it is on already.

    A forward pass is one part of two where the weights are frozen and backward multiplies by them once, of three where it
    also makes their gradients.
    """
    if run.checkpointing:
        return 0.0
    return 1 / (2 if run.is_adapter else 3)


def _with_checkpointing(proposal: Proposal) -> Iterator[Proposal]:
    """A proposal, and the same with gradient checkpointing beside it where that is off."""
    yield proposal
    if not proposal.run.checkpointing:
        yield Proposal(
            f"{CHECKPOINTING}, {proposal.change}",
            _checkpointed(proposal.run),
            proposal.slowdown + recomputation(proposal.run),
            proposal.effect,
        )


def _checkpointed(run: Run) -> Run:
    """The same run with gradient checkpointing, and what that brings along."""
    return dataclasses.replace(run, checkpointing=True, offload=run.offload or run.offloads_by_default)


def _not_compiled(run: Run) -> Run:
    """The same run with a key that leaves layers uncompiled: what follows a norm keeps its input."""
    if not run.compiled:
        return run
    layer = run.layer
    inputs = max(layer.linear_inputs, layer.num_norms * layer.hidden) + layer.ranks
    layer = dataclasses.replace(layer, linear_inputs=inputs)
    return dataclasses.replace(run, compiled=False, offloads_by_default=False, layer=layer)


def _as_adapter(run: Run, bits: int) -> Run:
    """The same model with rank-16 adapters on all linear layers, and gradient checkpointing."""
    layer = run.layer
    widths = 4 * layer.hidden + 2 * (layer.attention + layer.key_value) + 3 * (layer.hidden + layer.intermediate)
    trained = 16 * widths * run.num_layers
    return dataclasses.replace(
        _checkpointed(run),
        is_adapter=True,
        num_params=run.num_params + trained,
        num_trained=trained,
        trained=(Weight((16, trained // 16), 4),),
        optimizer=PLAIN_OPTIMIZER if _projects(run) else run.optimizer,
        trained_bytes=4,
        weight_bits=bits,
        head_trained=False,
    )
