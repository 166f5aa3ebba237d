"""Override flags: any key of the schema can be set on the command line.

`--micro-batch-size 2`, `--micro_batch_size=2`, `--trl.beta 0.1`, `--sample-packing`, `--no-sample-packing`. A flag
becomes a keyword whose dots are double underscores (`trl__beta`), and its text becomes a value in two steps: here a bare
switch becomes true or false, and `coerce_override` gives the rest the type of the value that it replaces.

`config_options.json`, generated from the schema, tells switches from options and known keys from misspelt ones.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

OPTIONS_FILE = Path(__file__).parents[1] / "config_options.json"

TRUE_WORDS = frozenset({"true", "yes", "on", "1"})
FALSE_WORDS = frozenset({"false", "no", "off", "0"})
NULL_WORDS = frozenset({"null", "~"})

_INTEGER = re.compile(r"[-+]?\d+")
_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?")


@dataclass(frozen=True)
class ConfigOption:
    """One key of the schema.

    Attributes:
        key: dotted path, such as `trl.beta`.
        type: words such as `bool`, `int`, `bool | "auto"`, `dict[str, str]`.
        help: one line.
        group: the heading that `--help` lists it under.
    """

    key: str
    type: str
    help: str = ""
    group: str = ""

    @property
    def is_switch(self) -> bool:
        """Only ever true or false, so that the flag alone says it."""
        return _alternatives(self.type) == {"bool"}

    @property
    def may_stand_alone(self) -> bool:
        return "bool" in _alternatives(self.type)

    @property
    def is_text(self) -> bool:
        """Text or one of several words, so that `no` and `001` mean themselves."""
        return all(word == "str" or word.startswith('"') for word in _alternatives(self.type))

    @property
    def is_mapping(self) -> bool:
        """Whether keys may be set below this one that the schema does not list."""
        return bool(re.search(r"\b(dict|object|any)\b", self.type, re.IGNORECASE))


@dataclass
class Arguments:
    """A command line, sorted.

    Attributes:
        own: what the command's own click options and arguments parse.
        overrides: keyword -> value; text still has to be given a type.
        launcher_args: what stands after `--`.
    """

    own: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    launcher_args: list[str] = field(default_factory=list)


@functools.cache
def read_config_options() -> dict[str, ConfigOption]:
    """Dotted key -> option, from the generated file; empty when the file is absent."""
    if not OPTIONS_FILE.is_file():
        return {}
    rows = json.loads(OPTIONS_FILE.read_text(encoding="utf-8"))
    options = (
        ConfigOption(
            key=row["flag"].removeprefix("--").replace("-", "_"),
            type=str(row["type"]),
            help=row.get("help") or "",
            group=row.get("group") or "",
        )
        for row in rows
    )
    return {option.key: option for option in options}


def sort_arguments(args: list[str], own_options: dict[str, bool]) -> Arguments:
    """Sort a command line into the command's own options, overrides and launcher arguments.

    Args:
        args: everything after the command's name.
        own_options: `--flag` -> whether it takes a value; with underscores or dashes.

    Raises:
        click.UsageError: an override without its value.
    """
    result = Arguments()
    if "--" in args:
        cut = args.index("--")
        args, result.launcher_args = args[:cut], args[cut + 1 :]
    waiting = list(reversed(args))
    while waiting:
        token = waiting.pop()
        if not token.startswith("--"):
            result.own.append(token)
            continue
        flag, equals, text = token.partition("=")
        value = text if equals else None
        own = flag.replace("_", "-")
        if own in own_options:
            result.own += _own_option(own, value, own_options)
            if own_options[own] and value is None and waiting:
                result.own.append(waiting.pop())
            continue
        key, value = _override(flag, value, waiting)
        result.overrides[key.replace(".", "__")] = value
    return result


def _own_option(flag: str, value: str | None, own_options: dict[str, bool]) -> list[str]:
    """An option of the command as click reads it; `--debug=False`, as launchers pass it on, becomes `--no-debug`."""
    if value is None:
        return [flag]
    if own_options[flag]:
        return [f"{flag}={value}"]
    if value.lower() in TRUE_WORDS:
        return [flag]
    if value.lower() in FALSE_WORDS:
        return [f"--no-{flag[2:]}"] if f"--no-{flag[2:]}" in own_options else []
    raise click.UsageError(f"`{flag}` is a switch: write `{flag}`, not `{flag}={value}`.")


def _override(flag: str, value: str | None, waiting: list[str]) -> tuple[str, Any]:
    """Key and value of an override flag; takes its value from `waiting` when it needs one."""
    options = read_config_options()
    key = flag[2:].replace("-", "_")
    if not re.fullmatch(r"\w+(\.\w+)*", key):
        raise click.UsageError(f"`{flag}` is not the name of a key.")
    option = options.get(key)
    if option is None and key.startswith("no_") and (not options or key[3:] in options):
        positive = options.get(key[3:])
        if positive is not None and not positive.may_stand_alone:
            raise click.UsageError(
                f"`{flag}`: `{positive.key}` is not a switch ({positive.type}). Write `--{flag[5:]} VALUE`; `null` unsets it."
            )
        if value is not None:
            raise click.UsageError(f"`{flag}` takes no value; write `--{flag[5:]}={value}` instead.")
        return key[3:], False
    if value is not None:
        return key, value
    following = waiting[-1] if waiting else None
    if option is not None and option.may_stand_alone and not _belongs_to(option, following):
        return key, True
    if following is None or following.startswith("--"):
        if option is None:
            return key, True
        raise click.UsageError(f"`{flag}` needs a value ({option.type}): `{flag} VALUE` or `{flag}=VALUE`.")
    return key, waiting.pop()


def _belongs_to(option: ConfigOption, word: str | None) -> bool:
    """Whether the word after a flag that may stand alone is its value, and not the config file."""
    if word is None or word.startswith("--"):
        return False
    if word.lower() in TRUE_WORDS | FALSE_WORDS | NULL_WORDS:
        return True
    if option.is_switch:
        return False
    path = Path(word)
    # A folder is a config when it holds some. A checkpoint, which is a value, holds that of its run beside its state.
    exists = path.is_file() or (any(path.glob("*.y*ml")) and not (path / "trainer_state.json").is_file())
    looks_like_config = word == "-" or "://" in word or word.endswith((".yml", ".yaml", ".json")) or exists
    return not looks_like_config


def _alternatives(type_words: str) -> set[str]:
    """`bool | None` -> {"bool"}; `bool | "auto"` -> {"bool", '"auto"'}."""
    words = {word.strip() for word in re.split(r"\||,(?![^\[]*\])", type_words)}
    return words - {"", "None", "null"}


def unknown_keys(overrides: dict[str, Any]) -> list[str]:
    """The overridden keys, dotted, that the schema does not know. Empty when there is no generated file to ask."""
    options = read_config_options()
    return [key for key in (name.replace("__", ".") for name in overrides) if options and not _is_known(key, options)]


def _is_known(key: str, options: dict[str, ConfigOption]) -> bool:
    if key in options:
        return True
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        parent = options.get(".".join(parts[:end]))
        if parent is not None:
            has_children = any(name.startswith(parent.key + ".") for name in options)
            return parent.is_mapping and not has_children
    return False


def describe_unknown(key: str) -> str:
    """The error for a flag that names no key, with the nearest that does."""
    flag = "--" + key.replace("_", "-")
    near = difflib.get_close_matches(key, read_config_options(), n=1, cutoff=0.6)
    hint = f" Did you mean `--{near[0].replace('_', '-')}`?" if near else " `axolotl config-schema` lists the keys."
    return f"No such option or config key: `{flag}`.{hint}"


def coerce_override(key: str, value: Any, existing: Any = None) -> Any:
    """Give an override the type of the value it replaces, else the type that YAML would read.

    Text that does not fit the type of the existing value is read as YAML reads it (`bf16: true` may become `auto`,
    `val_set_size: 0` may become `0.05`); the schema then judges it like any other value.

    Args:
        key: dotted key. A key that the schema declares as text keeps its text, so that `--wandb-name 001` stays `001`.
        value: text of a flag, or a Python value, which is kept as it is.
        existing: the value in the config file, or None.
    """
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    if word in NULL_WORDS or value.strip() == "":
        return None if word in NULL_WORDS else value
    if isinstance(existing, bool) and word in TRUE_WORDS | FALSE_WORDS:
        return word in TRUE_WORDS
    if isinstance(existing, float) and (_INTEGER.fullmatch(word) or _FLOAT.fullmatch(word)):
        return float(word)
    if isinstance(existing, str):
        return value
    option = read_config_options().get(key)
    if existing is None and option is not None and option.is_text:
        return value
    return _read_like_yaml(value)


def _read_like_yaml(value: str) -> Any:
    text = value.strip()
    word = text.lower()
    if word in ("true", "yes", "on"):
        return True
    if word in ("false", "no", "off"):
        return False
    if word in ("none", "null", "~"):
        return None
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if text[:1] in "[{":
        from axolotl.cli.utils.read import parse_yaml

        return parse_yaml(text, f"the value `{text}`")
    return value


def apply_overrides(cfg: dict[str, Any], overrides: dict[str, Any]) -> list[str]:
    """Write overrides into `cfg`, in place. With `strict: true` only keys that the file has are written.

    Args:
        cfg: the config as read.
        overrides: keyword (`trl__beta`) -> value.

    Returns:
        The dotted keys that `strict: true` kept out.

    Raises:
        axolotl.exceptions.ConfigError: a nested key below a value that is not a mapping.
    """
    from axolotl.exceptions import ConfigError

    kept_out = []
    for name, value in overrides.items():
        *parents, last = name.split("__")
        dotted = name.replace("__", ".")
        if cfg.get("strict") and not _has_path(cfg, [*parents, last]):
            kept_out.append(dotted)
            continue
        place: Any = cfg
        for depth, parent in enumerate(parents, 1):
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                above = ".".join(parents[:depth])
                raise ConfigError(
                    f"`--{dotted.replace('_', '-')}`: `{above}: {place}` of the config holds no keys to set."
                )
        place[last] = coerce_override(dotted, value, place.get(last))
    return kept_out


def _has_path(cfg: dict[str, Any], path: list[str]) -> bool:
    for part in path:
        if not isinstance(cfg, dict) or part not in cfg:
            return False
        cfg = cfg[part]
    return True
