"""Bytes of the state that each optimizer keeps for a weight, from the weight's shape and the optimizer's options.

To add an optimizer: a row of `STATES`. What a row says is held against the real optimizer (`optimizers/states_test.py`). Single
numbers, such as the count of steps, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Weight:
    """Weights that are trained, all of one kind.

    Args:
        shape: of each.
        item: bytes of an element.
        count: how many of them.
        embedding: of a `torch.nn.Embedding`.
        hidden: a matrix of a hidden layer, neither embedding nor output head.
        projected: one of those whose gradients are projected (`optim_target_modules`).
    """

    shape: tuple[int, ...]
    item: int
    count: int = 1
    embedding: bool = False
    hidden: bool = True
    projected: bool = False

    @property
    def numel(self) -> int:
        """Elements of one."""
        return math.prod(self.shape)


Options = Mapping[str, Any]
StateBytes = Callable[[Weight, Options], float]

SMALLEST_IN_8_BITS = 4096  # elements; bitsandbytes and torchao keep smaller weights' states as they are
BLOCK = 256  # elements that share a scale


def state_bytes(optimizer: str, weights: Iterable[Weight], options: Options) -> float:
    """Bytes of state for all of `weights`; an optimizer that the table lacks is counted as Adam.

    Args:
        optimizer: its name.
        weights: what it trains.
        options: its arguments by name; those left out have the defaults of its class.
    """
    of_one = STATES.get(optimizer, STATES["adamw_torch"])
    return sum(weight.count * of_one(weight, options) for weight in weights)


def _moments(number: int, *optional: str, item: int | None = None) -> StateBytes:
    """As many tensors of the weight's shape, and one more for each option of these that is on; in the weight's dtype or of `item` bytes."""

    def of(weight: Weight, options: Options) -> float:
        return (number + sum(bool(options.get(name)) for name in optional)) * (item or weight.item) * weight.numel

    return of


def _bnb(number: int) -> StateBytes:
    """bitsandbytes with 8 bits: a byte, and a float32 scale for each block; states of embeddings, which are updated rarely, in 32 bits."""

    def of(weight: Weight, options: Options) -> float:
        if weight.embedding or weight.numel < options.get("min_8bit_size", SMALLEST_IN_8_BITS):
            return number * 4 * weight.numel
        return number * (weight.numel + 4 * math.ceil(weight.numel / BLOCK))

    return of


def _torchao(item: float, codes: int = 0) -> StateBytes:
    """Two moments of torchao in `item` bytes, a float32 scale for each block, and a table of `codes` float32 numbers for each tensor."""

    def of(weight: Weight, options: Options) -> float:
        number = 3 if options.get("amsgrad") else 2
        block = options.get("block_size", BLOCK)
        if weight.numel < SMALLEST_IN_8_BITS or weight.numel % block:
            return number * weight.item * weight.numel
        return number * (item * weight.numel + 4 * weight.numel / block + 4 * codes)

    return of


def _rows_and_columns(weight: Weight) -> int:
    """Elements of the factors of a second moment (Shazeer & Stern, https://arxiv.org/abs/1804.04235): means of rows and of columns."""
    *others, rows, columns = weight.shape
    return math.prod(others) * (rows + columns)


def _adafactor(weight: Weight, options: Options) -> float:
    """All in float32."""
    first = weight.numel if options.get("beta1") is not None else 0
    return 4 * (first + (weight.numel if len(weight.shape) < 2 else _rows_and_columns(weight)))


def _came(weight: Weight, options: Options) -> float:
    """A first moment, and factors of the second moment and of its instability, all in float32."""
    return 4 * (weight.numel + (weight.numel if len(weight.shape) < 2 else 2 * _rows_and_columns(weight)))


def _adalomo(weight: Weight, options: Options) -> float:
    return 4 * (weight.numel if len(weight.shape) < 2 else _rows_and_columns(weight))


def _optimi(weight: Weight, options: Options) -> float:
    """Kahan summation keeps what a half cannot take of an update."""
    kahan = options.get("kahan_sum")
    return _moments(3 if (weight.item < 4 if kahan is None else kahan) else 2)(weight, options)


def _anyprecision(weight: Weight, options: Options) -> float:
    item = _itemsize(options.get("momentum_dtype", torch.float32))
    item += _itemsize(options.get("variance_dtype", torch.float32))
    if options.get("use_kahan_summation"):
        item += _itemsize(options.get("compensation_buffer_dtype", torch.bfloat16))
    return item * weight.numel


def _itemsize(dtype: torch.dtype | str) -> int:
    return (dtype if isinstance(dtype, torch.dtype) else vars(torch)[dtype]).itemsize


def _flash(number: int, *, with_momentum: bool = False) -> StateBytes:
    """flashoptim: a byte each and a half for every 32, and the bits of a half weight that it lacks to `master_weight_bits`."""

    def of(weight: Weight, options: Options) -> float:
        kept = number + (1 if with_momentum and options.get("momentum") else 0)
        item = kept * (1 + 2 / 32 if options.get("quantize", True) else weight.item)
        master = options.get("master_weight_bits", 24)
        return weight.numel * (item + max(0, (master or 0) // 8 - weight.item))

    return of


def _matrices(of_hidden: StateBytes) -> StateBytes:
    """An optimizer of the matrices of hidden layers, beside AdamW for the rest."""

    def of(weight: Weight, options: Options) -> float:
        return (of_hidden if weight.hidden and len(weight.shape) == 2 else _moments(2))(weight, options)

    return of


def _dion(weight: Weight, options: Options) -> float:
    """The momentum, and Q (columns x rank) in float32."""
    smaller, multiple = min(weight.shape), options.get("rank_multiple_of", 1)
    rank = min(math.ceil(options.get("rank_fraction", 1.0) * smaller / multiple) * multiple, smaller)
    return weight.item * weight.numel + 4 * weight.shape[1] * rank


def _projection(weight: Weight, options: Options, rank: int) -> tuple[Weight, int]:
    """The projected gradient of a matrix, as a weight, and elements of the projection."""
    rows, columns = weight.shape
    tall = rows >= columns
    on_the_right = {"std": tall, "reverse_std": not tall, "right": True, "left": False}[options.get("proj_type", "std")]
    low = (rows, rank) if on_the_right else (rank, columns)
    return replace(weight, shape=low), rank * (columns if on_the_right else rows)


def _galore(inner: StateBytes) -> StateBytes:
    """The states of another optimizer for the projected gradient, its step, and the projection; with Q-GaLore that in codes of a byte."""

    def of(weight: Weight, options: Options) -> float:
        weight = replace(weight, embedding=False)  # these set no optimizer of single modules
        if not weight.projected:
            return inner(weight, options)
        low, projection = _projection(weight, options, min(options["rank"], *weight.shape))
        size = inner(low, options) + low.item * low.numel
        if options.get("cos_threshold", 1.1) <= 1:
            size += 4 * projection / min(low.shape)  # the first vector of the last one
        if not options.get("proj_bits"):
            return size + weight.item * projection
        groups = math.ceil(projection / options["proj_group_size"])
        return size + groups * (options["proj_group_size"] + 2 * 4)  # a scale and a zero point

    return of


def _apollo(weight: Weight, options: Options) -> float:
    """Two moments of the projected gradient, and the projection (Zhu et al., https://arxiv.org/abs/2412.05270)."""
    if not weight.projected:
        return _moments(2)(weight, options)
    rank = options["rank"] if options.get("proj", "random") == "random" else min(options["rank"], *weight.shape)
    low, projection = _projection(weight, options, rank)
    return weight.item * (2 * low.numel + projection)


_IN_32_BITS = {number: _moments(number, item=4) for number in (1, 2, 3)}  # states of bitsandbytes
_IN_MAIN_MEMORY = _moments(0)

STATES: dict[str, StateBytes] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), _moments(2, "amsgrad")),
    **dict.fromkeys(("adamc", "adopt_adamw", "adamw_torch_xla", "adamw_torch_npu_fused"), _moments(2)),
    "sgd": _moments(0, "momentum"),
    "adagrad": _moments(1),
    "rmsprop": _moments(1, "momentum", "centered"),
    "adafactor": _adafactor,
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), _bnb(2)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), _bnb(1)),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), _bnb(3)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), _IN_32_BITS[1]),
    "paged_adamw_32bit": _IN_32_BITS[2],
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), _IN_32_BITS[3]),
    "adamw_torch_8bit": _torchao(1.0, codes=256),
    "adamw_torch_4bit": _torchao(0.5, codes=16),
    "ao_adamw_fp8": _torchao(1.0),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam"), _moments(2)),
    "schedule_free_sgd": _moments(1),
    **dict.fromkeys(("galore_adamw", "galore_adamw_layerwise"), _galore(_moments(2, "amsgrad"))),
    **dict.fromkeys(("galore_adamw_8bit", "galore_adamw_8bit_layerwise", "q_galore_adamw8bit"), _galore(_bnb(2))),
    **dict.fromkeys(("galore_adafactor", "galore_adafactor_layerwise"), _galore(_adafactor)),
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), _apollo),
    "lomo": _moments(0),
    "adalomo": _adalomo,
    "grokadamw": _IN_MAIN_MEMORY,
    **dict.fromkeys(("stable_adamw", "optimi_adamw"), _optimi),
    "came_pytorch": _came,
    **dict.fromkeys(("flash_adamw", "flash_adam"), _flash(2)),
    **dict.fromkeys(("flash_sgd", "flash_sgdw"), _flash(0, with_momentum=True)),
    "flash_lion": _flash(1),
    "muon": _matrices(_moments(1)),
    "dion": _matrices(_dion),
    "sinkgd": _matrices(_moments(0)),
    "adamw_anyprecision": _anyprecision,
}
