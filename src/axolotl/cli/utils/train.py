"""Utilities for axolotl train CLI command: which processes run it, and with which command lines."""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axolotl.exceptions import ConfigError, NotBuiltError
from axolotl.run.children import run_child
from axolotl.utils.logging import get_logger
from axolotl.utils.processes import LAUNCHER_PID
from axolotl.utils.redact import redact_secrets
from axolotl.utils.temporary import temporary_folder

LOG = get_logger(__name__)

LAUNCHERS = ("accelerate", "torchrun", "python")

# Arguments of `accelerate launch` that may be given without `--`.
ACCELERATE_KEYWORDS = ("main_process_port", "num_processes")

# Launchers kill what has not ended so long after a signal; half a minute of their own is less than a large checkpoint takes.
SAVING_SECONDS = "1800"


def build_command(base_cmd: list[str], options: dict[str, Any]) -> list[str]:
    """Build command list from base command and options.

    Args:
        base_cmd: the command without options.
        options: keyword -> value; None is left out, and a double underscore stands for a dot.

    Returns:
        The command with `--key-with-dashes=value` for each option.
    """
    flags = [
        f"--{key.replace('__', '.').replace('_', '-')}={value}" for key, value in options.items() if value is not None
    ]
    return [*base_cmd, *flags]


def generate_config_files(config: str, sweep: str | None) -> Iterator[tuple[str, bool]]:
    """Generate list of configuration files to process.

    Args:
        config: path of the config.
        sweep: path of a sweep file, or None.

    Yields:
        A tuple of the configuration file name and a boolean indicating whether this is a group of configurations (i.e., a
        sweep), whose files last as long as this process. A run of a sweep has `output_dir: <output_dir of the config>/sweepNNNN`.
    """
    if not sweep:
        yield config, False
        return
    import yaml

    from axolotl.cli.config import read_config
    from axolotl.cli.utils.sweeps import generate_sweep_configs

    base_config, sweep_config = read_config(config), read_config(sweep)
    runs = generate_sweep_configs(base_config, sweep_config)
    folder = temporary_folder("axolotl-sweep-")
    for number, run in enumerate(runs, 1):
        name = f"sweep{number:04d}"
        run["output_dir"] = str(Path(run.get("output_dir") or "./model-out") / name)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
        yield str(path), True


def launch_training(
    cfg_file: str,
    launcher: str | None,
    cloud: str | None,
    kwargs: dict[str, Any],
    launcher_args: list[str] | None = None,
    use_exec: bool = False,
) -> None:
    """Execute training with the given configuration.

    Args:
        cfg_file: path of the config.
        launcher: one of `LAUNCHERS`, or None to choose (see `choose_launcher`).
        cloud: path of a cloud config.
        kwargs: arguments and overrides of `axolotl train`.
        launcher_args: arguments for accelerate or torchrun.
        use_exec: replace this process instead of waiting for a child.

    Raises:
        subprocess.CalledProcessError: the launched processes failed.
        SystemExit: this process was signalled, and what it launched has ended.
    """
    refuse_cloud(cloud)
    launch("train", cfg_file, launcher, kwargs, launcher_args, use_exec=use_exec)


def refuse_cloud(cloud: str | None) -> None:
    """Raise a `NotBuiltError` when a cloud config is given."""
    if cloud:
        raise NotBuiltError(
            f"`--cloud {cloud}` is known but not implemented here yet. Run axolotl on the machine itself."
        )


def launch(
    module: str,
    cfg_file: str,
    launcher: str | None,
    kwargs: dict[str, Any],
    launcher_args: list[str] | None = None,
    *,
    use_exec: bool = True,
) -> None:
    """Run `axolotl.cli.<module>` in this process or in the processes of a launcher.

    Args:
        module: module of `axolotl.cli` with a `do_cli`.
        cfg_file: path of the config.
        launcher: one of `LAUNCHERS`, or None to choose.
        kwargs: arguments and overrides of the command.
        launcher_args: arguments for accelerate or torchrun.
        use_exec: replace this process instead of waiting for a child.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    launcher_args = launcher_args or shlex.split(os.environ.get("AXOLOTL_LAUNCHER_ARGS", ""))
    if launcher is None:
        launcher, reason = choose_launcher(module, kwargs, launcher_args)
        LOG.info("launcher: %s (%s)", launcher, reason)
    if launcher == "python":
        if launcher_args:
            raise ConfigError(
                f"`-- {shlex.join(launcher_args)}` are arguments of a launcher, but `--launcher python` starts none. "
                "Write `--launcher accelerate` or `--launcher torchrun`."
            )
        run_in_process(module, cfg_file, {key: kwargs[key] for key in kwargs if key not in ACCELERATE_KEYWORDS})
        return
    command = launcher_command(module, cfg_file, launcher, kwargs, launcher_args)
    # The launchers stand beside this interpreter, which need not be on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    env = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SAVING_SECONDS, **os.environ, "PATH": path}
    LOG.info(
        "running: %s", shlex.join(launcher_command(module, cfg_file, launcher, redact_secrets(kwargs), launcher_args))
    )
    if use_exec:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(command[0], command, {**env, LAUNCHER_PID: str(os.getpid())})
    elif code := run_child(command, env=env):
        raise subprocess.CalledProcessError(code, command)


def choose_launcher(module: str, kwargs: dict[str, Any], launcher_args: list[str]) -> tuple[str, str]:
    """The launcher when the user names none, and why: one process where one is enough.

    Returns:
        (one of `LAUNCHERS`, the reason).
    """
    if os.environ.get("AXOLOTL_LAUNCHER") in LAUNCHERS:
        return os.environ["AXOLOTL_LAUNCHER"], "AXOLOTL_LAUNCHER is set"
    if any(name in os.environ for name in ("WORLD_SIZE", "LOCAL_RANK")):
        return "python", "a launcher started this process"
    if launcher_args or any(key in kwargs for key in ACCELERATE_KEYWORDS):
        return "accelerate", "launcher arguments are given"
    if module == "inference":
        return "python", "one process answers"
    if str(kwargs.get("use_ray", "")).lower() == "true":
        return "python", "`use_ray` starts the workers"
    import torch

    num_gpus = torch.cuda.device_count()
    if num_gpus > 1:
        return "accelerate", f"{num_gpus} GPUs are visible"
    return "python", "one process is enough"


def launcher_command(
    module: str, cfg_file: str, launcher: str, kwargs: dict[str, Any], launcher_args: list[str]
) -> list[str]:
    """The command line that runs `axolotl.cli.<module>` under a launcher.

    Raises:
        ConfigError: an unknown launcher.
    """
    options = dict(kwargs)
    if launcher == "accelerate":
        base = ["accelerate", "launch"]
        for key in ACCELERATE_KEYWORDS:
            if key in options:
                base += [f"--{key}", str(options.pop(key))]
        base += launcher_args
    elif launcher == "torchrun":
        num_processes = options.pop("num_processes", None)
        port = options.pop("main_process_port", None)
        base = ["torchrun", *([f"--nproc_per_node={num_processes}"] if num_processes else [])]
        base += [f"--master_port={port}"] if port else []
        base += _with_rendezvous(launcher_args)
    else:
        raise ConfigError(f"`--launcher {launcher}` is unknown. Known: {', '.join(LAUNCHERS)}.")
    return build_command([*base, "-m", f"axolotl.cli.{module}", str(cfg_file)], options)


def _with_rendezvous(launcher_args: list[str]) -> list[str]:
    """The arguments of torchrun; an endpoint alone also gets a backend and an id, without which it is not used."""
    given = {arg.split("=")[0].lstrip("-").replace("-", "_") for arg in launcher_args if arg.startswith("--")}
    if "rdzv_endpoint" not in given:
        return launcher_args
    extra = [] if "rdzv_backend" in given else ["--rdzv_backend", "c10d"]
    extra += [] if "rdzv_id" in given else ["--rdzv_id", secrets.token_hex(8)]
    return [*launcher_args, *extra]


def run_in_process(module: str, cfg_file: str, kwargs: dict[str, Any]) -> None:
    """Call `do_cli` of `axolotl.cli.<module>` here."""
    import importlib

    importlib.import_module(f"axolotl.cli.{module}").do_cli(config=cfg_file, **kwargs)


def run_sweep(
    config: str, sweep: str, launcher: str | None, kwargs: dict[str, Any], launcher_args: list[str] | None = None
) -> int:
    """Train every config of a sweep, each in processes of its own. A run that fails does not stop the others.

    Args:
        config: path of the config.
        sweep: path of the sweep file.
        launcher: one of `LAUNCHERS`, or None to choose.
        kwargs: arguments and overrides, for all runs. `output_dir` is the folder that holds the folders of the runs.
        launcher_args: arguments for accelerate or torchrun.

    Returns:
        The number of runs that failed.

    Raises:
        ConfigError: an override sets a key that the sweep varies.
        SystemExit: a signal ended the run under way, which saved, and with it the sweep.
    """
    from axolotl.cli.config import read_config
    from axolotl.cli.utils.sweeps import swept_keys

    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    both = sorted({key.replace("__", ".") for key in kwargs} & swept_keys(read_config(sweep)))
    if both:
        flag = both[0].replace("_", "-")
        raise ConfigError(f"`--{flag}` sets `{both[0]}`, which `--sweep {sweep}` varies. Remove one of them.")
    if launcher is None:
        launcher, reason = choose_launcher("train", kwargs, launcher_args or [])
        LOG.info("launcher: %s (%s)", launcher, reason)
    results: list[tuple[str, str, float]] = []
    for cfg_file, _ in generate_config_files(config, sweep):
        output_dir = Path(read_config(cfg_file)["output_dir"])
        options = dict(kwargs)
        if "output_dir" in options:
            options["output_dir"] = output_dir = Path(options["output_dir"]) / output_dir.name
        started = time.monotonic()
        LOG.info("sweep: %s", output_dir)
        try:
            if launcher == "python":
                command = build_command([sys.executable, "-m", "axolotl.cli.train", cfg_file], options)
                if code := run_child(command):
                    raise subprocess.CalledProcessError(code, command)
            else:
                launch_training(cfg_file, launcher, None, options, launcher_args)
            outcome = "done"
        except subprocess.CalledProcessError as error:
            outcome = f"failed (exit code {error.returncode})"
            LOG.error("sweep: %s %s", output_dir, outcome)
        results.append((str(output_dir), outcome, time.monotonic() - started))
    width = max(len(output_dir) for output_dir, _, _ in results)
    table = "\n".join(f"  {name:<{width}}  {seconds:8.1f} s  {outcome}" for name, outcome, seconds in results)
    LOG.info("sweep: %d runs\n%s", len(results), table)
    return sum(outcome != "done" for _, outcome, _ in results)
