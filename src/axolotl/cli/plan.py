"""CLI to show what a run will do before it costs anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from axolotl.cli.config import inspect_cfg
from axolotl.exceptions import ConfigError

_UNITS_IN_GIB = {"": 1.0, "gib": 1.0, "g": 1.0, "gb": 1e9 / 2**30, "mib": 1 / 1024, "mb": 1e6 / 2**30, "tib": 1024.0}


def do_cli(
    config: Path | str = Path("examples/"), gpu: str | None = None, memory: str | None = None, **kwargs: Any
) -> None:
    """Prints the plan of a run.

    The exit code is 1 when the run does not fit the memory that was named.

    Args:
        config: Path to `axolotl` config YAML file.
        gpu: Name of the GPU that the memory is forecast for.
        memory: Memory of that GPU instead, such as `24GiB`.
        kwargs: `axolotl` config values.
    """
    memory_gib = parse_memory(memory) if memory else None
    cfg = inspect_cfg(config, machine=planned_machine(gpu), **kwargs)
    from axolotl.plan import make_plan, print_plan

    plan = make_plan(cfg, memory_gib=memory_gib, gpu=gpu)
    print_plan(plan)
    if plan.fits is False:
        raise click.exceptions.Exit(1)


def planned_machine(gpu: str | None) -> dict[str, Any] | None:
    """What the machine can do that the plan is for: one with the GPU that is named, else this one if it has a GPU.

    Returns:
        As `machine_capabilities`; None for this machine.
    """
    from axolotl.utils.environment import machine_capabilities
    from axolotl.utils.gpus import ASSUMED_GPU, capabilities_of

    here = machine_capabilities()
    if gpu is None and here["compute_capability"]:
        return None
    return {**capabilities_of(gpu or ASSUMED_GPU), **{key: here[key] or 1 for key in ("n_gpu", "n_node")}}


def parse_memory(text: str) -> float:
    """`24GiB` -> 24.0, in GiB; a number alone is in GiB.

    Raises:
        ConfigError: no amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS_IN_GIB or float(match[1]) <= 0:
        raise ConfigError(f"`--memory {text}` is no amount of memory. Write it like `24GiB` or `80GB`.")
    return float(match[1]) * _UNITS_IN_GIB[match[2]]
