"""Patterns of `unfrozen_parameters`: names, anchors, literal dots, ranges of rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from axolotl.exceptions import ConfigError
from axolotl.utils.freeze import LayerNamePattern, freeze_layers_except


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))
        self.head = nn.Linear(4, 10, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def unfrozen(patterns: list[str]) -> set[str]:
    model = Tiny()
    freeze_layers_except(model, patterns)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["embed"], {"embed.weight"}),
        (["^head.weight$"], {"head.weight"}),
        (["layers.1.weight"], {"layers.1.weight"}),
        (["layers.1[01].bias"], {"layers.10.bias", "layers.11.bias"}),
        ([r"layers\.0\.(weight|bias)", "embed"], {"layers.0.weight", "layers.0.bias", "embed.weight"}),
        (["^layers.[2]+.bias"], {"layers.2.bias"}),
    ],
)
def test_patterns(patterns: list[str], expected: set[str]) -> None:
    assert unfrozen(patterns) == expected


def test_a_dot_is_a_dot() -> None:
    assert not LayerNamePattern("a.b").match("axb")
    assert LayerNamePattern("a.b").match("x.a.b.c")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("embed.weight[8:]", (8, None)),
        ("^embed.weight$[:3]", (0, 3)),
        ("embed.weight[2:5]", (2, 5)),
        ("embed.weight[4]", (4, 5)),
        ("layers.[0-9]+.bias", None),
        ("layers.1[01]", None),
    ],
)
def test_ranges(pattern: str, expected) -> None:
    assert LayerNamePattern(pattern).range == expected


def test_only_the_rows_of_the_ranges_get_gradients() -> None:
    model = Tiny()
    freeze_layers_except(model, ["^embed.weight$[8:]", "^embed.weight$[1:3]", "^embed.weight$[2:4]"])
    model(torch.arange(10)).sum().backward()
    rows = model.embed.weight.grad.abs().sum(-1).nonzero().squeeze(-1).tolist()
    assert rows == [1, 2, 3, 8, 9]
    assert model.head.weight.grad is None


def test_a_pattern_without_a_range_wins_over_one_with_a_range() -> None:
    model = Tiny()
    freeze_layers_except(model, ["embed.weight[8:]", "embed"])
    model(torch.arange(10)).sum().backward()
    assert bool((model.embed.weight.grad.abs().sum(-1) > 0).all())


@pytest.mark.parametrize("patterns", [[], ["nothing.like.this"], ["embed.weight[20:30]"], ["embed.weight[5:2]"], ["("]])
def test_what_would_train_nothing_is_refused(patterns: list[str]) -> None:
    with pytest.raises(ConfigError, match="unfrozen_parameters"):
        unfrozen(patterns)
