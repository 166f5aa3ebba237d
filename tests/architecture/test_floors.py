"""Imports point down or stay in the room, and never in a circle. The table is the one of docs/architecture.md."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"

# Longest prefix wins. A room is the prefix itself: modules under one prefix may import each other.
FLOOR = {
    "axolotl": 0,
    "axolotl.exceptions": 0,
    "axolotl.logging_config": 0,
    "axolotl._lazy": 0,
    "axolotl._moved": 0,
    "axolotl._not_built": 0,
    "axolotl.utils": 0,
    "axolotl.utils.dict": 0,
    "axolotl.utils.gpus": 0,
    "axolotl.utils.logging": 0,
    "axolotl.utils.tee": 0,
    "axolotl.utils.schemas": 1,
    "axolotl.integrations": 8,
    "axolotl.integrations.base": 1,
    "axolotl.integrations.config": 1,
    "axolotl.common.const": 1,
    "axolotl.common.architectures": 1,
    "axolotl.kernels": 2,
    "axolotl.utils.distributed": 2,
    "axolotl.utils.environment": 2,
    "axolotl.utils.bench": 2,
    "axolotl.prompters": 3,
    "axolotl.prompt_tokenizers": 3,
    "axolotl.prompt_strategies": 3,
    "axolotl.datasets": 3,
    "axolotl.core.chat": 3,
    "axolotl.core.datasets": 3,
    "axolotl.utils.chat_templates": 3,
    "axolotl.utils.tokenization": 3,
    "axolotl.processing_strategies": 3,
    "axolotl.utils.data": 4,
    "axolotl.utils.samplers": 4,
    "axolotl.utils.collators": 4,
    "axolotl.loaders": 4,
    "axolotl.model_support": 4,
    "axolotl.monkeypatch": 4,
    "axolotl.models": 4,
    "axolotl.utils.lora": 4,
    "axolotl.utils.merge": 4,
    "axolotl.utils.forecast": 4,
    "axolotl.utils.forecast_states": 4,
    "axolotl.utils.remedies": 4,
    "axolotl.utils.freeze": 4,
    "axolotl.utils.quantization": 4,
    "axolotl.utils.ctx_managers": 4,
    "axolotl.utils.model_shard_quant": 4,
    "axolotl.core": 5,
    "axolotl.core.trainers": 5,
    "axolotl.core.training_args": 5,
    "axolotl.core.training_args_base": 5,
    "axolotl.core.checkpoint": 5,
    "axolotl.utils.optimizers": 5,
    "axolotl.utils.schedulers": 5,
    "axolotl.utils.callbacks": 5,
    "axolotl.utils.report": 5,
    "axolotl.core.builders": 6,
    "axolotl.train": 7,
    "axolotl.run": 7,
    "axolotl.model_card": 7,
    "axolotl.evaluate": 7,
    "axolotl.plan": 7,
    "axolotl.plan_run": 7,
    "axolotl.convert": 7,
    "axolotl.utils.config": 7,
    "axolotl.utils.trainer": 7,
    "axolotl.common": 7,
    "axolotl.common.datasets": 7,
    "axolotl.cli": 8,
}

# The ground floor may use itself; the standard library is all that lies below.
GROUND = {name for name, floor in FLOOR.items() if floor == 0}

# Rooms of one floor that work on one subject and may import each other.
ONE_ROOM = [
    {"axolotl.prompters", "axolotl.prompt_tokenizers", "axolotl.prompt_strategies", "axolotl.datasets", "axolotl.core.chat", "axolotl.core.datasets",
     "axolotl.utils.chat_templates", "axolotl.utils.tokenization", "axolotl.processing_strategies"},
    {"axolotl.utils.data", "axolotl.utils.samplers", "axolotl.utils.collators"},
    {"axolotl.loaders", "axolotl.model_support", "axolotl.monkeypatch", "axolotl.models", "axolotl.utils.lora", "axolotl.utils.merge", "axolotl.utils.forecast",
     "axolotl.utils.forecast_states", "axolotl.utils.remedies",
     "axolotl.utils.freeze", "axolotl.utils.quantization", "axolotl.utils.ctx_managers", "axolotl.utils.model_shard_quant"},
    {"axolotl.core", "axolotl.core.trainers", "axolotl.core.training_args", "axolotl.core.training_args_base", "axolotl.core.checkpoint",
     "axolotl.utils.optimizers", "axolotl.utils.schedulers", "axolotl.utils.callbacks", "axolotl.utils.report"},
    {"axolotl.utils.config", "axolotl.utils.trainer", "axolotl.common.datasets", "axolotl.common", "axolotl.train", "axolotl.run", "axolotl.evaluate", "axolotl.plan", "axolotl.plan_run", "axolotl.model_card"},
    {"axolotl.utils.schemas", "axolotl.integrations.base", "axolotl.integrations.config", "axolotl.common.const", "axolotl.common.architectures"},
    {"axolotl.utils.distributed", "axolotl.utils.environment", "axolotl.utils.bench", "axolotl.kernels"},
    {"axolotl.cli", "axolotl.integrations"},
]  # fmt: skip

MODULES = sorted(
    path for path in SRC.rglob("*.py") if not path.name.endswith("_test.py") and path.name != "conftest.py"
)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    if module.startswith("axolotl.integrations.") and module.endswith(".args"):
        return "axolotl.utils.schemas"
    while module not in FLOOR:
        module = module.rpartition(".")[0]
    return module


def imports_of(path: Path):
    """Every `axolotl` module a file imports, also inside functions, not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(id(inner) for statement in node.body for inner in ast.walk(statement))
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "axolotl":
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([node.module] if node.module else [])])
            if base.split(".")[0] == "axolotl":
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    known = (SRC / Path(*full.split("."))).with_suffix(".py").exists() or (
                        SRC / Path(*full.split("."))
                    ).is_dir()
                    yield (full if known else base), node.lineno


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path):
    here = room(module_name(path))
    upward = []
    for imported, line in imports_of(path):
        there = room(imported)
        if there == here or {here, there} <= GROUND or any(here in group and there in group for group in ONE_ROOM):
            continue
        if FLOOR[there] >= FLOOR[here]:
            upward.append(f"line {line}: {here} (floor {FLOOR[here]}) imports {imported} (floor {FLOOR[there]})")
    assert not upward, "\n".join(upward)


def test_no_modules_import_each_other_in_a_circle():
    graph = {module_name(path): {imported for imported, _ in imports_of(path)} for path in MODULES}
    for name, imported in graph.items():
        graph[name] = imported - {name} - CLOSES_A_CIRCLE.get(name, set())
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


# Imports inside a function, of what is built upon the module that imports it.
CLOSES_A_CIRCLE = {"axolotl.prompt_strategies.chat_template": {"axolotl.prompt_strategies.mistral_chat"}}


def test_the_table_names_rooms_that_exist():
    missing = [name for name in FLOOR if not _exists(name) and name not in LATER]
    assert not missing, missing


# Rooms of the plan that have no file yet; a row goes when its room opens.
LATER = {
    "axolotl.utils.ctx_managers",
    "axolotl.utils.model_shard_quant",
    "axolotl.utils.quantization",
}


def _exists(name: str) -> bool:
    path = SRC / Path(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()
