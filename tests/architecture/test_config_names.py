"""Every `cfg.<name>` read in the source is a key that the schema declares: a misspelt one would read as None forever."""

from __future__ import annotations

import ast
from pathlib import Path

from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlConfigWCapabilities

SRC = Path(__file__).resolve().parents[2] / "src" / "axolotl"
METHODS = set(dir(DictDefault))


def declared() -> set[str]:
    names = set(AxolotlConfigWCapabilities.model_fields)
    names |= {field.alias for field in AxolotlConfigWCapabilities.model_fields.values() if field.alias}
    for args in SRC.glob("integrations/*/args.py"):
        for node in ast.walk(ast.parse(args.read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def reads(tree: ast.AST):
    """Attribute reads on a variable or attribute called `cfg` (`cfg.x`, `self.cfg.x`)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else None
        if name == "cfg":
            yield node.attr, node.lineno


def test_every_config_read_is_declared():
    known = declared()
    unknown = [
        f"{path.relative_to(SRC)}:{line} cfg.{name}"
        for path in sorted(SRC.rglob("*.py"))
        if not path.name.endswith("_test.py")
        for name, line in reads(ast.parse(path.read_text()))
        if name not in known and name not in METHODS
    ]
    assert not unknown, "\n".join(unknown)
