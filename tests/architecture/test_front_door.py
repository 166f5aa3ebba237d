"""The front door is light: `axolotl --help` loads nothing heavy, and every command answers `--help`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "transformers", "datasets", "pydantic", "yaml", "numpy")


def loaded_after(code: str) -> list[str]:
    script = (
        f"import sys\n{code}\nimport json; print('LOADED ' + json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return json.loads(out.rsplit("LOADED ", 1)[1])


def test_importing_the_door_loads_nothing_heavy():
    assert loaded_after("import axolotl.cli.main") == []


def test_help_loads_nothing_heavy():
    assert loaded_after("from axolotl.cli.main import cli\ncli(['--help'], standalone_mode=False)") == []


def test_help_is_quick():
    """Median under 100 ms on an idle two-core machine; the bound here leaves room for a busy one."""
    bare, ours = [], []
    for _ in range(5):
        for timings, command in (
            (bare, [sys.executable, "-c", "import click"]),
            (ours, [sys.executable, "-m", "axolotl.cli.main", "--help"]),
        ):
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True)
            timings.append(time.perf_counter() - start)
    assert statistics.median(ours) < 2.5 * statistics.median(bare) + 0.05


def commands() -> list[str]:
    from axolotl.cli.main import cli

    return sorted(cli.list_commands(None))


@pytest.mark.parametrize("command", commands())
def test_every_command_answers_help(command: str):
    done = subprocess.run([sys.executable, "-m", "axolotl.cli.main", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
