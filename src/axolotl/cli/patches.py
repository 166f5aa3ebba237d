"""CLI to show what a run will change in other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from axolotl.cli.config import inspect_cfg
from axolotl.monkeypatch.ledger import rows_for


def do_cli(config: Path | str = Path("examples/"), **kwargs: Any) -> None:
    """Prints the rows of the patch ledger that apply to a config: what, why, and until when.

    Args:
        config: Path to `axolotl` config YAML file.
        kwargs: `axolotl` config values.
    """
    rows = rows_for(inspect_cfg(config, **kwargs))
    click.echo(f"This run changes {len(rows)} things in other libraries:")
    for row in rows:
        click.echo(f"\n{row.name}\n  what   {row.what}\n  why    {row.why}\n  until  {row.until}\n  stage  {row.stage}")
