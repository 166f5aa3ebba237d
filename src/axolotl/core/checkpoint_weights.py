"""Weights of a checkpoint that have other names than the parameters of the model that trains.

transformers keeps the experts of a layer in one parameter and writes them one by one, as their authors did, and renames parts
of some models. Its trainer loads a checkpoint by names, and leaves out what it does not find.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from axolotl.exceptions import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def is_converted(folder: Path, model: nn.Module) -> bool:
    """Whether a checkpoint of the whole model has weights that the model has under other names."""
    if isinstance(model, PeftModel) or not isinstance(model, PreTrainedModel):
        return False
    return bool(_names_in(folder) - set(model.state_dict()))


def load_converted(folder: Path, model: Any) -> None:
    """Load the weights of a checkpoint as `from_pretrained` would.

    Args:
        folder: the checkpoint, with its `config.json`.
        model: gets the weights, bit for bit.

    Raises:
        CheckpointError: the checkpoint has not all weights of the model.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    # In float32 nothing is rounded on the way to a model of several number formats.
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    loaded, report = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    check_complete(model, set(report["missing_keys"]), folder)
    model.load_state_dict(loaded.state_dict())


def check_complete(model: nn.Module, missing: set[str], folder: str | Path) -> None:
    """Raise `CheckpointError` when weights were not loaded; those that share memory with others were."""
    own = model.state_dict()
    there = {value.data_ptr() for name, value in own.items() if name not in missing}
    lost = sorted(name for name in missing & set(own) if own[name].data_ptr() not in there)
    if lost:
        shown = ", ".join(lost[:4]) + (", ..." if len(lost) > 4 else "")
        raise CheckpointError(
            f"the checkpoint {folder} lacks {len(lost)} weights of the model: {shown}. It belongs to another model, or to another "
            "version of transformers. Resume from another one with `resume_from_checkpoint`, or choose another `output_dir`."
        )


def _names_in(folder: Path) -> set[str]:
    if (folder / WEIGHTS).is_file():
        with safe_open(folder / WEIGHTS, "pt") as file:
            return set(file.keys())
    if (folder / INDEX).is_file():
        return set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    return set()
