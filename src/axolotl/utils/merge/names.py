"""Stored tensor names <-> parameter names.

A checkpoint may store its tensors under other names than the model class uses, or in other pieces (one tensor per expert
where the class holds one 3-D parameter). transformers keeps these rules as weight conversions; here they are applied to
one parameter at a time, and reversed, so that the merged checkpoint has the layout of the base checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from axolotl.exceptions import ModelError
from axolotl.utils.merge.tensors import TensorInfo


@dataclass
class Group:
    """Stored tensors that are converted together into parameters."""

    converter: WeightConverter
    layer_name: str
    patterns: dict[str, str] = field(default_factory=dict)  # stored name -> source pattern of the converter
    params: tuple[str, ...] = ()


class NameMap:
    """Which stored tensors make which parameters of a model.

    Args:
        model: the model on the meta device.
        stored: the tensors of the checkpoint.
    """

    def __init__(self, model: PreTrainedModel, stored: Iterable[TensorInfo]):
        self._model = model
        self._mapping: list[Any] = get_model_conversion_mapping(model)
        model._weight_conversions = self._mapping or None  # what `revert_weight_conversion` reverses
        self.param_of: dict[str, str] = {}  # stored name -> parameter, where one makes the other
        self.stored_of: dict[str, str] = {}
        self.group_of_stored: dict[str, Group] = {}
        self.group_of_param: dict[str, Group] = {}
        infos = {info.name: info for info in stored}
        self._sort(infos)
        for group in {id(group): group for group in self.group_of_stored.values()}.values():
            blanks = {name: torch.empty(infos[name].shape, device="meta") for name in group.patterns}
            group.params = tuple(self.to_params(group, blanks))
            self.group_of_param.update(dict.fromkeys(group.params, group))

    def _sort(self, infos: dict[str, TensorInfo]) -> None:
        renamings = [rule for rule in self._mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._mapping if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        params = self._model.state_dict()
        prefix = self._model.base_model_prefix
        groups: dict[str, Group] = {}
        for name in sorted(infos, key=_natural):
            target, pattern = rename_source_key(name, renamings, converters, prefix, params)
            if target not in params and name in params:
                target, pattern = rename_source_key(name, [], [], prefix, params)
            if target not in params:
                continue  # the model class does not load it; it is copied as it is
            if pattern is None:
                self.param_of[name], self.stored_of[target] = target, name
            else:
                group = groups.setdefault(target, Group(copy.deepcopy(by_pattern[pattern]), target))
                group.patterns[name] = pattern
                self.group_of_stored[name] = group

    def to_params(self, group: Group, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Stored tensors of a group -> the parameters they make."""
        converter = copy.deepcopy(group.converter)
        for name, pattern in group.patterns.items():
            converter.add_tensor(group.layer_name, name, pattern, tensors[name])
        made = converter.convert(group.layer_name, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def to_stored(self, group: Group, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameters of a group -> the stored tensors that make them.

        Raises:
            ModelError: the conversion of this architecture has no exact reverse.
        """
        stored = revert_weight_conversion(self._model, params)
        if stored.keys() != group.patterns.keys():
            raise ModelError(
                f"The adapter changes {', '.join(params)}, which the base checkpoint stores as {len(group.patterns)} "
                f"tensors such as `{next(iter(group.patterns))}`; transformers cannot write them back under these "
                "names. Load and save the base model with `save_pretrained` first, and merge into that copy."
            )
        return stored


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts `experts.2` before `experts.10`: the order in which pieces are stacked."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
