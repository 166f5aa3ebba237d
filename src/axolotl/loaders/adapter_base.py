"""Does an adapter, or a checkpoint, belong to this base model?

Adapters of one shape fit bases of another family without an error: only answers turn to noise. The config of the base model
is saved beside every adapter, and compared with the base that the adapter is put on.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PretrainedConfig

from axolotl.exceptions import ModelError

# What makes two models of one family differ in what a layer's input means.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def read_trained_config(folder: Path) -> tuple[dict[str, Any], str] | None:
    """The config of the model that `folder` was trained on, and where it was found; None when nothing tells.

    Looked for beside the adapter, then where `base_model_name_or_path` of its config points: a folder here, or the hub's cache.
    """
    for place in _places(folder):
        config = _read_json(place)
        if config and config.get("model_type"):
            return config, str(place)
    return None


def _places(folder: Path) -> Iterator[Path]:
    yield folder / "config.json"
    written = _read_json(folder / "adapter_config.json") or {}
    name = written.get("base_model_name_or_path")
    if name:
        yield Path(name) / "config.json"
        with contextlib.suppress(
            HFValidationError
        ):  # a folder that is not here, such as `./base`, is no name of the hub
            cached = try_to_load_from_cache(name, "config.json", revision=written.get("revision"))
            if isinstance(cached, str):
                yield Path(cached)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def check_fits_base(folder: str | Path, base: PretrainedConfig, *, key: str, base_name: str) -> None:
    """Raise ModelError when `folder` was trained on a model of another family or other sizes than `base`.

    Args:
        folder: an adapter or a checkpoint.
        base: config of the base model it is put on.
        key: the key that names `folder`, for the message.
        base_name: the base model as the user wrote it.
    """
    path = Path(folder)
    found = read_trained_config(path) if path.is_dir() else None
    if found is None:
        return
    trained, place = found
    ours = base.to_dict()
    differing = _difference(trained, ours, _has_other_layers(path))
    if differing is None:
        return
    what, theirs, mine = differing
    raise ModelError(
        f"`{key}: {folder}` was trained on another base model than `base_model: {base_name}`: `{what}` is {theirs} in {place}, but "
        f"{mine} here. Write the base model that it was trained on."
    )


def _has_other_layers(folder: Path) -> bool:
    """Layer replication changes the number of layers of the model that is trained."""
    return bool((_read_json(folder / "adapter_config.json") or {}).get("layer_replication"))


def _difference(trained: dict[str, Any], ours: dict[str, Any], other_layers: bool) -> tuple[str, Any, Any] | None:
    if trained["model_type"] != ours.get("model_type"):
        return "model_type", trained["model_type"], ours.get("model_type")
    # The language model of a multimodal one keeps its sizes one level down.
    trained, ours = (config.get("text_config") or config for config in (trained, ours))
    for size in _SIZES:
        if other_layers and size == "num_hidden_layers":
            continue
        theirs, mine = trained.get(size), ours.get(size)
        if theirs is not None and mine is not None and theirs != mine:
            return size, theirs, mine
    return None
