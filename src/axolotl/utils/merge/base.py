"""Single weights of a model folder, by the parameter names of the model class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from axolotl.exceptions import ModelError
from axolotl.utils.merge.names import NameMap
from axolotl.utils.merge.tensors import TensorStore, model_files


class BaseWeights:
    """Reads parameters from the files of a model, one at a time.

    Args:
        folder: safetensors or .bin files.
        model_class: the class whose parameters are asked for.
        config: of the model.
    """

    def __init__(self, folder: Path, model_class: Any, config: PretrainedConfig):
        self.folder = folder
        self.store = TensorStore(model_files(folder))
        with torch.device("meta"):
            blank = model_class(config)
        self.names = NameMap(blank, self.store.tensors.values())

    def read(self, param: str) -> torch.Tensor:
        """A parameter, on the CPU, in its stored dtype.

        Raises:
            ModelError: the folder does not hold it.
        """
        if param in self.names.stored_of:
            return self.store.read(self.names.stored_of[param])
        group = self.names.group_of_param.get(param)
        if group is None:
            raise ModelError(f"`{self.folder}` stores no tensor for `{param}`.")
        return self.names.to_params(group, {name: self.store.read(name) for name in group.patterns})[param]
