"""CLI to write the shipped examples, DeepSpeed configs and docs to a folder."""

from __future__ import annotations

import click

from axolotl.cli.utils.fetch import fetch_from_github


def do_fetch(directory: str, dest: str | None = None) -> None:
    """Write the shipped files of `directory` and say what was done with each kind.

    Args:
        directory: `examples`, `deepspeed_configs` or `docs`.
        dest: folder to write to.
    """
    report = fetch_from_github(f"{directory}/", dest)
    click.echo(f"{report.folder}: {len(report.written)} written, {len(report.unchanged)} already there")
    for name in report.kept:
        click.echo(f"  {name} was changed by you and is kept; the shipped one is {name}.new")
