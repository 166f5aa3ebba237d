"""Every documented module path, name and signature exists. What is not built yet stands in one list that may only shrink."""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import json
from pathlib import Path

import click
import pytest

HERE = Path(__file__).parent
API = json.loads((HERE / "documented_api.json").read_text())
NOT_BUILT = set((HERE / "not_built_api.txt").read_text().split())

NAMES = sorted(
    {f"{module}.{name}" for module, names in API["modules"].items() for name in names} | set(API["signatures"])
)


def resolve(path: str):
    """The object at a documented path such as `utils.freeze.LayerNamePattern.match`."""
    parts = ["axolotl", *path.split(".")]
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as err:
            if err.name and ".".join(parts[:cut]).startswith(err.name):
                continue
            raise
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def expected(path: str, table: set[str]) -> bool:
    """Whether `path` lies under a path of `table`."""
    return any(path == row or path.startswith(row + ".") for row in table)


@pytest.mark.parametrize("module", sorted(API["modules"]))
def test_module_imports(module: str):
    if expected(module, NOT_BUILT):
        with pytest.raises((ImportError, AttributeError)):
            importlib.import_module(f"axolotl.{module}")
        return
    importlib.import_module(f"axolotl.{module}")


@pytest.mark.parametrize("path", NAMES)
def test_documented_name(path: str):
    if expected(path, NOT_BUILT):
        with pytest.raises((ImportError, AttributeError)):
            resolve(path)
        return
    found = resolve(path)
    documented = API["signatures"].get(path)
    if documented is not None and not isinstance(found, click.Command) and not _made_from_fields(found):
        problems = signature_problems(found, documented)
        assert not problems, f"{path}{inspect.signature(found)}: {'; '.join(problems)}"


def _made_from_fields(found) -> bool:
    """Enums and pydantic models: the documentation prints them as `Name()` whatever their members are."""
    return inspect.isclass(found) and (issubclass(found, enum.Enum) or hasattr(found, "model_fields"))


def signature_problems(found, documented: list[str]) -> list[str]:
    """How `found` differs from the documented parameters: a missing name, another default, a new required one."""
    parameters = inspect.signature(found).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    names = {row.split("=")[0] for row in documented}
    problems = []
    for row in documented:
        name, _, default = row.partition("=")
        if name.startswith("*"):
            continue
        if name not in parameters:
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                problems.append(f"lacks `{name}`")
            continue
        parameter = parameters[name]
        if default and parameter.default is inspect.Parameter.empty:
            problems.append(f"`{name}` should default to {default}")
        elif default and not same_default(parameter.default, default):
            problems.append(f"`{name}` defaults to {parameter.default!r}, documented {default}")
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        if (
            required
            and name not in names
            and name not in ("self", "ctx")
            and "*args" not in names
            and "*_args" not in names
        ):
            problems.append(f"requires `{name}`, which is not documented")
    return problems


def same_default(actual, documented: str) -> bool:
    try:
        return actual == ast.literal_eval(documented)
    except (ValueError, SyntaxError):
        return True  # an expression such as Path('examples/') or list()
