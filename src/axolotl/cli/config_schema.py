"""The config as JSON Schema (draft 2020-12), for editors that complete and check YAML.

The keys of our own plugins are in it, whether or not a config lists the plugin.
"""

from __future__ import annotations

import functools
import json
from importlib import import_module
from typing import Any

import yaml
from pydantic import BaseModel, create_model

from axolotl.exceptions import ConfigError
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.deprecated import ALIASES, DeprecatedParameters
from axolotl.utils.schemas.unknown import PLUGIN_OF_PREFIX, nearest
from axolotl.utils.schemas.utils import LEGACY_PREFIX

DRAFT = "https://json-schema.org/draft/2020-12/schema"
# YAML 1.1 reads `2e-4` as text.
NUMBER_AS_TEXT = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
# Keys that are read under another name, by model.
OTHER_SPELLINGS = {
    "FSDPConfig": "^fsdp_",
    "SFTDataset": f"^{LEGACY_PREFIX}",
    "DPODataset": f"^{LEGACY_PREFIX}",
    "KTODataset": f"^{LEGACY_PREFIX}",
}


def plugin_models() -> dict[str, type[BaseModel]]:
    """Path of each plugin of ours -> the model of its keys."""
    models = {}
    for path in sorted(set(PLUGIN_OF_PREFIX.values())):
        module, _, name = path.rpartition(".")
        plugin = getattr(import_module(module), name)()
        args_module, _, args_name = plugin.get_input_args().rpartition(".")
        models[path] = getattr(import_module(args_module), args_name)
    return models


@functools.cache
def config_schema() -> dict[str, Any]:
    """The whole schema."""
    model = create_model("AxolotlConfig", __base__=(AxolotlInputConfig, *plugin_models().values()))
    schema = model.model_json_schema()
    for name, section in schema["$defs"].items():
        _close(section, name)
    _close(schema, "AxolotlConfig")
    properties = schema["properties"]
    for name in DeprecatedParameters.model_fields:
        properties[name]["deprecated"] = True
    for alias, name in ALIASES.items():
        properties[alias] = {**properties[name], "description": f"Same as `{name}`."}
    schema = _as_written(schema)
    return {
        "$schema": DRAFT,
        **schema,
        "title": "Axolotl config",
        "properties": dict(sorted(schema["properties"].items())),
    }


def print_config_schema(output_format: str = "json", field: str | None = None) -> None:
    """Print the schema, or the part of it that describes one key.

    Args:
        output_format: `json` or `yaml`.
        field: a key of the config, or a dotted one such as `trl.beta`.

    Raises:
        ConfigError: there is no such key.
    """
    schema = config_schema() if field is None else field_schema(field)
    text = json.dumps(schema, indent=2, ensure_ascii=False) if output_format == "json" else yaml.safe_dump(schema)
    print(text.rstrip())


def field_schema(field: str) -> dict[str, Any]:
    """The part of the schema that describes one key, with the definitions it refers to.

    Raises:
        ConfigError: there is no such key.
    """
    whole = config_schema()
    found: dict[str, Any] = whole
    path = ""
    for step in field.replace("-", "_").split("."):
        properties = _properties(found, whole)
        if step not in properties:
            near = nearest(step, properties)
            hint = f" Did you mean `{path}{near}`?" if near else ""
            raise ConfigError(f"`{path}{step}` is not a key of the config.{hint}")
        found = properties[step]
        path += f"{step}."
    used = {name: whole["$defs"][name] for name in sorted(_references(found, whole))}
    return {"$schema": DRAFT, **found, **({"$defs": used} if used else {})}


def _close(section: dict[str, Any], name: str) -> None:
    if section.get("type") == "object" and "properties" in section:
        section["additionalProperties"] = False
        if name in OTHER_SPELLINGS:
            section["patternProperties"] = {OTHER_SPELLINGS[name]: {}}


def _as_written(node: Any) -> Any:
    """Accept what YAML 1.1 makes of numbers and of the word `no`; leave out titles and empty defaults."""
    if isinstance(node, list):
        return [_as_written(item) for item in node]
    if not isinstance(node, dict):
        return node
    if isinstance(node.get("properties"), dict):
        return {
            key: {name: _as_written(value) for name, value in item.items()}
            if key == "properties"
            else _as_written(item)
            for key, item in node.items()
        }
    kept = {
        key: _as_written(item)
        for key, item in node.items()
        if not (key == "default" and item is None) and key != "title"
    }
    if kept.get("type") == "number":
        kept |= {"type": ["number", "string"], "pattern": NUMBER_AS_TEXT}
    if "no" in kept.get("enum", ()):
        kept["enum"] = [*kept["enum"], False]
        kept.pop("type", None)
    return kept


def _properties(node: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """The keys of the section that a node describes, directly, as an entry of a list, or by reference."""
    if "$ref" in node:
        return _properties(whole["$defs"][node["$ref"].rpartition("/")[2]], whole)
    if "properties" in node:
        return node["properties"]
    found: dict[str, Any] = {}
    for branch in [*node.get("anyOf", ()), *([node["items"]] if isinstance(node.get("items"), dict) else ())]:
        found = {**_properties(branch, whole), **found}
    return found


def _references(node: Any, whole: dict[str, Any]) -> set[str]:
    if isinstance(node, list):
        return set().union(*(_references(item, whole) for item in node))
    if not isinstance(node, dict):
        return set()
    names = set().union(*(_references(item, whole) for item in node.values()))
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        names |= {name} | _references(whole["$defs"][name], whole)
    return names
