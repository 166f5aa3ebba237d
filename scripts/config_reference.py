#!/usr/bin/env python3
"""Write what is generated from the config schema: `docs/config-reference.md` and `src/axolotl/cli/config_options.json`.

Run it after changing a key. `--check` writes nothing and fails when a file is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo

from axolotl._not_built import NO_EFFECT_YET, NOT_BUILT, PLUGINS_NOT_BUILT, is_set
from axolotl.cli.config_schema import plugin_models
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl.utils.schemas.deprecated import ALIASES

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "config-reference.md"
OPTIONS = ROOT / "src" / "axolotl" / "cli" / "config_options.json"

INTRODUCTION = """# Config reference

Every key of the YAML, with its type, its default (if it has one) and what it does. This page is generated from the schema by
`scripts/config_reference.py`. `axolotl config-schema` prints the same as JSON Schema, for editors; to let an editor complete
and check a config, run `axolotl config-schema > axolotl.schema.json` and put this line at the top of the config:

```yaml
# yaml-language-server: $schema=./axolotl.schema.json
```

An unknown key is an error that names the nearest known one. The environment variable `AXOLOTL_UNKNOWN_KEYS=warn` turns such
errors into warnings.
"""


def groups() -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """(heading, keys) of each subject, in the order of the schema; then of each plugin."""
    for base in AxolotlInputConfig.__mro__[1:]:
        if issubclass(base, BaseModel) and base.__annotations__:
            fields = AxolotlInputConfig.model_fields
            yield heading(base), {name: fields[name] for name in base.__annotations__ if name in fields}
    for path, model in plugin_models().items():
        yield f"Plugin `{path}`", dict(model.model_fields)


def heading(model: type[BaseModel]) -> str:
    return (model.__doc__ or model.__name__).strip().splitlines()[0].rstrip(".")


def type_words(annotation: Any) -> str:
    """`Annotated[int, ...] | None` -> `int | None`; literals are quoted; a model is `object`."""
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is Any:
        return "any"
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_words(parts[0])
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_words(part) for part in parts))
    if origin is Literal:
        return " | ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in parts)
    if origin in (list, tuple, dict):
        return f"{origin.__name__}[{', '.join(type_words(part) for part in parts)}]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "object"
    if isinstance(annotation, type) and issubclass(annotation, str) and annotation is not str:
        return " | ".join(f'"{member}"' for member in annotation)  # type: ignore[attr-defined]
    return annotation.__name__


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        if not isinstance(part, str | int):
            yield from models_in(part)


def options() -> list[dict[str, Any]]:
    """One row per key that a flag can set: top-level keys, and the keys of sections as `--section.key`."""
    rows = []
    for group, fields in groups():
        for name, field in fields.items():
            rows.append(option(name, field, group))
            sections = list(models_in(field.annotation))
            if len(sections) == 1 and get_origin(strip_none(field.annotation)) is not list:
                rows += [
                    option(f"{name}.{child}", child_field, group)
                    for child, child_field in sections[0].model_fields.items()
                ]
    known = {row["flag"]: row for row in rows}
    for alias, name in ALIASES.items():
        target = known[flag_of(name)]
        rows.append({**target, "flag": flag_of(alias), "help": f"Same as `{target['flag']}`."})
    return rows


def option(name: str, field: FieldInfo, group: str) -> dict[str, Any]:
    words = type_words(field.annotation)
    kinds = {kind for kind in words.split(" | ") if kind != "None"}
    return {
        "flag": flag_of(name),
        "type": words,
        "multiple": any(kind.startswith("list[") for kind in kinds),
        "is_bool": kinds == {"bool"},
        "help": field.description or "",
        "group": group,
    }


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def strip_none(annotation: Any) -> Any:
    parts = [part for part in get_args(annotation) if part is not type(None)]
    return parts[0] if get_origin(annotation) in (Union, types.UnionType) and len(parts) == 1 else annotation


def reference() -> str:
    """The reference page."""
    described: set[type[BaseModel]] = set()
    return "\n".join(
        [INTRODUCTION, *(line for title, fields in groups() for line in section(title, fields, 2, described))]
    )


def section(title: str, fields: dict[str, FieldInfo], level: int, described: set[type[BaseModel]]) -> Iterator[str]:
    """A table of keys, then a table for each section among them that was not described before."""
    yield f"{'#' * level} {title}\n"
    if any(plugin in title for plugin in PLUGINS_NOT_BUILT):
        yield "Not implemented yet.\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for name, field in fields.items():
        yield f"| `{name}` | {cell(type_words(field.annotation))} | {default_of(field)} | {meaning(name, field)}{built(name, level)} |"
    yield ""
    for name, field in fields.items():
        for model in dict.fromkeys(models_in(field.annotation)):
            if model not in described:
                described.add(model)
                yield from section(
                    f"`{name}`: {heading(model)}", dict(model.model_fields), min(level + 1, 6), described
                )


def cell(words: str) -> str:
    words = words.removesuffix(" | None")
    return "`" + words.replace("|", "\\|") + "`"


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=False)
    return (
        "" if default is None or isinstance(default, BaseModel) or field.default_factory else f"`{json.dumps(default)}`"
    )


def meaning(name: str, field: FieldInfo) -> str:
    alias = field.validation_alias
    others = [f"`{choice}`" for choice in alias.choices if choice != name] if isinstance(alias, AliasChoices) else []
    text = (field.description or "").replace("|", "\\|")
    return f"{text} Also written {', '.join(others)}." if others else text


def built(name: str, level: int) -> str:
    """Says of a top-level key that it is refused, or without effect."""
    if level > 2:
        return ""
    if name in NOT_BUILT:
        refused, _ = NOT_BUILT[name]
        return " **Not implemented yet.**" if refused is is_set else " **Some values are not implemented yet.**"
    idle = NO_EFFECT_YET.get(name)
    if idle is None:
        return ""
    return " **Has no effect yet.**" if idle is is_set else " **Some values have no effect yet.**"


def outputs() -> dict[Path, str]:
    return {
        REFERENCE: reference(),
        OPTIONS: json.dumps(options(), indent=1, ensure_ascii=False) + "\n",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = {path: text for path, text in outputs().items() if not path.is_file() or path.read_text("utf-8") != text}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} {'is out of date: run scripts/config_reference.py' if check else 'written'}")
        if not check:
            path.write_text(text, "utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
