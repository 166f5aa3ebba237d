"""Keys that no model knows, at every depth, with the nearest key that one does."""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel

from axolotl.utils.schemas.datasets import dataset_model, pretraining_model
from axolotl.utils.schemas.deprecated import ALIASES, OBSOLETE, REMOVED, RENAMES
from axolotl.utils.schemas.utils import LEGACY_PREFIX

# Keys of a plugin start with its prefix, or are listed whole.
PLUGIN_OF_PREFIX = {
    "cut_cross_entropy": "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
    "dense_mixer": "axolotl.integrations.densemixer.DenseMixerPlugin",
    "diffusion": "axolotl.integrations.diffusion.DiffusionPlugin",
    "expert_parallel_": "axolotl.integrations.expert_parallel.ExpertParallelPlugin",
    "grokfast_": "axolotl.integrations.grokfast.GrokfastPlugin",
    "hatchery": "axolotl.integrations.hatchery.HatcheryPlugin",
    "kd_": "axolotl.integrations.kd.KDPlugin",
    "expert_backend": "axolotl.integrations.kernels.KernelsPlugin",
    "nonexpert_quantization": "axolotl.integrations.kernels.KernelsPlugin",
    "moe_": "axolotl.integrations.kernels.KernelsPlugin",
    "use_scattermoe": "axolotl.integrations.kernels.KernelsPlugin",
    "use_sonicmoe": "axolotl.integrations.kernels.KernelsPlugin",
    "use_dsv4_kernels": "axolotl.integrations.kernels.KernelsPlugin",
    "use_glm_dsa_kernels": "axolotl.integrations.kernels.KernelsPlugin",
    "dsv4_": "axolotl.integrations.kernels.KernelsPlugin",
    "gemma4_fp8_nonexpert": "axolotl.integrations.kernels.KernelsPlugin",
    "gemma4_nf4_nonexpert": "axolotl.integrations.kernels.KernelsPlugin",
    "nvfp4_merge_aware": "axolotl.integrations.kernels.KernelsPlugin",
    "liger_": "axolotl.integrations.liger.LigerPlugin",
    "llmcompressor": "axolotl.integrations.llm_compressor.LLMCompressorPlugin",
    "lm_eval_": "axolotl.integrations.lm_eval.LMEvalPlugin",
    "mora": "axolotl.integrations.mora.MoraPlugin",
    "nemo_gym_": "axolotl.integrations.nemo_gym.NemoGymPlugin",
    "spectrum_": "axolotl.integrations.spectrum.SpectrumPlugin",
    "use_swanlab": "axolotl.integrations.swanlab.SwanLabPlugin",
    "swanlab_": "axolotl.integrations.swanlab.SwanLabPlugin",
}

# With more unknown keys than this, the file is no config, and a search for what was meant takes seconds.
MANY_UNKNOWN = 100

# Lists whose entries are read with a model that depends on the entry and on `rl`.
ENTRY_MODEL = {
    "datasets": dataset_model,
    "test_datasets": dataset_model,
    "pretraining_dataset": pretraining_model,
}


def unknown_keys(data: dict[str, Any], model: type[BaseModel]) -> tuple[list[str], list[str]]:
    """Keys in `data`, at every depth, that `model` does not have.

    Args:
        data: the config as written, after `apply_renames`.
        model: `AxolotlInputConfig`, or a model that adds the keys of plugins to it.

    Returns:
        Errors and warnings, one line each. With `AXOLOTL_UNKNOWN_KEYS=warn` there are no errors.
    """
    errors: list[str] = []
    warnings: list[str] = []
    for path, name, known in _strangers(data, model, ""):
        if not path and name in OBSOLETE:
            if data[name] is not None:
                warnings.append(f"`{name}` has no effect any more: {OBSOLETE[name]}.")
            continue
        errors.append(_message(path, name, known, guess=len(errors) < MANY_UNKNOWN))
    if os.environ.get("AXOLOTL_UNKNOWN_KEYS", "").lower() == "warn":
        return [], [*warnings, *(f"{error} Ignored." for error in errors)]
    return errors, warnings


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, if one is like enough."""
    by_shape = {_shape(other): other for other in known}
    found = difflib.get_close_matches(_shape(name), by_shape, n=1, cutoff=0.7)
    if not found:
        longer = [shape for shape in by_shape if shape.startswith(f"{_shape(name)}_")]
        found = longer if len(longer) == 1 else []
    return by_shape[found[0]] if found else None


def _shape(name: str) -> str:
    return str(name).lower().replace("-", "_")


def _message(path: str, name: str, known: frozenset[str], guess: bool) -> str:
    plugin = None if path else _plugin_of(name, known)
    if plugin:
        return f"`{name}` belongs to a plugin that is not listed. Add `{plugin}` under `plugins:`, or remove the key."
    near = nearest(name, known) if guess else None
    remedy = f"Did you mean `{path}{near}`?" if near else "Remove it, or see docs/config-reference.md."
    return f"`{path}{name}` is not a key of {'the config' if not path else f'`{path[:-1]}`'}. {remedy}"


def _plugin_of(name: str, known: frozenset[str]) -> str | None:
    """The plugin that this key belongs to, unless its keys are known: then the key is misspelt."""
    for prefix, plugin in PLUGIN_OF_PREFIX.items():
        if name.startswith(prefix) and not any(other.startswith(prefix) for other in known):
            return plugin
    return None


def _strangers(data: dict[str, Any], model: type[BaseModel], path: str) -> Iterator[tuple[str, str, frozenset[str]]]:
    """(path of the mapping with a final dot, unknown key, known keys), depth first."""
    known, models = _words(model)
    for name, value in data.items():
        if name not in known:
            if not _is_legacy(name, model):
                yield path, str(name), known
        elif not path and name in ENTRY_MODEL and isinstance(value, list | tuple):
            for i, entry in enumerate(value):
                if isinstance(entry, dict):
                    yield from _strangers(entry, ENTRY_MODEL[name](entry, data.get("rl")), f"{name}.{i}.")
        elif name in models:
            for suffix, entry in _mappings(value):
                yield from _strangers(entry, models[name], f"{path}{name}{suffix}.")


def _mappings(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield "", value
    elif isinstance(value, list | tuple):
        yield from ((f".{i}", entry) for i, entry in enumerate(value) if isinstance(entry, dict))


def _is_legacy(name: Any, model: type[BaseModel]) -> bool:
    """`message_field_<property>` of a dataset and `fsdp_<key>` of `fsdp_config` are read under another name."""
    known, _ = _words(model)
    text = str(name)
    if text.startswith(LEGACY_PREFIX) and "message_property_mappings" in known:
        return True
    return text.startswith("fsdp_") and model.__name__ == "FSDPConfig" and text.removeprefix("fsdp_") in known


@cache
def _words(model: type[BaseModel]) -> tuple[frozenset[str], dict[str, type[BaseModel]]]:
    """The keys of a model, and the models that closed sections among them are read with."""
    known: set[str] = set()
    models: dict[str, type[BaseModel]] = {}
    for name, field in model.model_fields.items():
        names = {name}
        if isinstance(field.validation_alias, AliasChoices):
            names |= {choice for choice in field.validation_alias.choices if isinstance(choice, str)}
        elif isinstance(field.validation_alias, str):
            names.add(field.validation_alias)
        known |= names
        found = list(_models_in(field.annotation))
        if len(found) == 1:
            models |= dict.fromkeys(names, found[0])
    if "base_model" in known:
        known |= {*ALIASES, *RENAMES, *REMOVED}
    return frozenset(known), models


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models that a value of this type can be read with. None if it may also be a free mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _models_in(get_args(annotation)[0])
    elif origin in (Union, types.UnionType, list, tuple):
        parts = get_args(annotation)
        if not any(part is dict or get_origin(part) is dict for part in parts):
            for part in parts:
                yield from _models_in(part)
