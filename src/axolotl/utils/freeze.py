"""Freeze all parameters of a model except those that match a list of patterns.

A pattern is a regular expression on parameter names whose dots are literal, optionally followed by a range of rows:
`model.embed_tokens.weight$[32000:]` trains rows 32000 and up of the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import nn

from axolotl.exceptions import ConfigError
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

_RANGE = re.compile(r"^(.+)\[([0-9]*)(?::([0-9]*))?\]$")


class LayerNamePattern:
    """A pattern of parameter names with an optional range of rows.

    Attributes:
        raw_pattern: as written.
        name_regex: what a name is searched with.
        range: `(start, end)` rows, `end` None for the last, or None for all rows.
    """

    def __init__(self, pattern: str):
        self.raw_pattern = pattern
        name, self.range = self._split(pattern)
        try:
            self.name_regex = re.compile(re.sub(r"\\?\.", r"\\.", name))
        except re.error as error:
            raise ConfigError(f"`unfrozen_parameters: [{pattern}]` is not a regular expression: {error}.") from error

    @staticmethod
    def _split(pattern: str) -> tuple[str, tuple[int, int | None] | None]:
        match = _RANGE.match(pattern)
        if match is None or not (match[2] or match[3]):
            return pattern, None
        if match[3] is None and not pattern.removesuffix(f"[{match[2]}]").endswith(("$", "weight", "bias")):
            # `[0]` behind anything else is a set of characters, as in `layers.[0]`.
            return pattern, None
        start = int(match[2] or 0)
        if match[3] is None:
            return match[1], (start, start + 1)
        end = int(match[3]) if match[3] else None
        if end is not None and end <= start:
            raise ConfigError(f"`unfrozen_parameters: [{pattern}]`: the range must end after it starts.")
        return match[1], (start, end)

    def match(self, name: str) -> bool:
        """Whether the pattern is found anywhere in a parameter's name."""
        return self.name_regex.search(name) is not None


def _merge_ranges(ranges: list[tuple[int, int | None]], num_rows: int) -> list[tuple[int, int]]:
    """Sorted ranges without overlap, cut at the number of rows."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted((start, num_rows if end is None else min(end, num_rows)) for start, end in ranges):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _mask_rows(kept: list[tuple[int, int]]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A gradient hook that zeroes all rows but those of `kept`."""

    def hook(grad: torch.Tensor) -> torch.Tensor:
        masked = torch.zeros_like(grad)
        for start, end in kept:
            masked[start:end] = grad[start:end]
        return masked

    return hook


def _kept_rows(matching: list[LayerNamePattern], num_rows: int) -> list[tuple[int, int]]:
    """Rows that the patterns of a parameter leave trainable."""
    if any(pattern.range is None for pattern in matching):
        return [(0, num_rows)]
    return _merge_ranges([pattern.range for pattern in matching if pattern.range], num_rows)


def find_frozen_rows(model: nn.Module, regex_patterns: Sequence[str]) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Parameters that train in part, each with the numbers of its frozen rows (int64, on the CPU).

    Args:
        model: the model, as `freeze_layers_except` got it.
        regex_patterns: the same patterns.
    """
    patterns = [LayerNamePattern(pattern) for pattern in regex_patterns]
    found = []
    for name, parameter in model.named_parameters():
        matching = [pattern for pattern in patterns if pattern.match(name)]
        if not matching or not parameter.dim():
            continue
        frozen = torch.ones(parameter.shape[0], dtype=torch.bool)
        for start, end in _kept_rows(matching, parameter.shape[0]):
            frozen[start:end] = False
        if frozen.any():
            found.append((parameter, frozen.nonzero().squeeze(-1)))
    return found


def freeze_layers_except(model: nn.Module, regex_patterns: Sequence[str]) -> None:
    """Freeze all parameters of `model` except those that a pattern matches. The model is changed in place.

    A row range keeps the parameter trainable and zeroes the gradient of its other rows. Weight decay, and optimizers that mix
    rows, would still move them: while training, `FrozenRowsCallback` puts them back after each step.

    Args:
        regex_patterns: regular expressions on parameter names. A dot is a literal dot; `^` and `$` anchor. A range
            `[start:end]` behind the expression selects rows, and is not part of the expression.

    Raises:
        ConfigError: no parameter matches any pattern, or a range lies outside the parameter.
    """
    patterns = [LayerNamePattern(pattern) for pattern in regex_patterns]
    parameters = dict(model.named_parameters())
    unused = set(patterns)
    num_trainable = 0
    for name, parameter in parameters.items():
        matching = [pattern for pattern in patterns if pattern.match(name)]
        unused.difference_update(matching)
        parameter.requires_grad_(bool(matching))
        if not matching:
            continue
        num_trainable += 1
        kept = _kept_rows(matching, parameter.shape[0])
        if not kept:
            raise ConfigError(
                f"`unfrozen_parameters: [{matching[0].raw_pattern}]`: {name} has only {parameter.shape[0]} rows."
            )
        if kept != [(0, parameter.shape[0])]:
            parameter.register_hook(_mask_rows(kept))
            LOG.info(f"Only rows {kept} of {name} are trained.")
    if num_trainable == 0:
        some = ", ".join(list(parameters)[:6])
        raise ConfigError(
            f"`unfrozen_parameters: {list(regex_patterns)}` matches no parameter, so nothing would be trained. "
            f"Parameters are named like {some}. Tied weights have one name, that of the input embedding."
        )
    for pattern in unused:
        LOG.warning(f"`unfrozen_parameters: [{pattern.raw_pattern}]` matches no parameter.")
