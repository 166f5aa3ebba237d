"""Who trains a benchmark's YAML: this package, or a peer in its own process and environment, watched by one clock."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import HERE
from step_clock import PATH as STEP_CLOCK

TRAIN = ("-m", "axolotl.cli.main", "train")
PEERS = {name: HERE / "peers" / f"run_{name}.py" for name in ("trl", "unsloth", "llamafactory", "axolotl")}
# What runs the model as PyTorch and peft have it.
PLAIN = {
    "torch_compile": False, "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False,
    "lora_embedding_kernel": False,
}  # fmt: skip


PROGRESS = re.compile(r"\d+%\||\d+it \[|\d+ examples \[")
LOG_LINES = 40


class RunError(RuntimeError):
    """Why there are no numbers of a runner.

    Args:
        what: the reason.
        log_end: the last lines of its log.
        log: where the whole of it is.
    """

    def __init__(self, what: str, log_end: Sequence[str] = (), log: Path | None = None) -> None:
        super().__init__(what)
        self.log_end = list(log_end)
        self.log = log

    @property
    def out_of_memory(self) -> bool:
        return any("out of memory" in line.lower() for line in self.log_end)

    def recorded(self) -> dict[str, Any]:
        """What stands in place of numbers."""
        return {"error": str(self), **({"log_end": self.log_end} if self.log_end else {})}


@dataclasses.dataclass(frozen=True)
class Runner:
    """Something that trains a YAML.

    Attributes:
        name: in the record.
        python: the interpreter of its environment.
        words: what comes between the interpreter and the YAML.
        keys: YAML keys in place of the row's.
    """

    name: str
    python: str
    words: tuple[str, ...]
    keys: dict[str, Any] = dataclasses.field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """That of this process, with the clock to import. Another python does not get this one's packages.

        All files are on this machine: nobody's first step waits for an answer from the Hub.
        """
        own = self.python == sys.executable
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep) if own else []
        paths = [str(HERE), *(str(Path(path).resolve()) for path in inherited if path)]
        return {
            "CUDA_VISIBLE_DEVICES": "0",
            "HF_HUB_OFFLINE": "1",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
        }


def find_runner(wanted: str, folder: Path) -> Runner:
    """The runner of one `--compare`.

    Raises:
        SystemExit: there is no such peer.
        RunError: it cannot be run by that python.
    """
    name, _, python = wanted.partition("=")
    if name == "plain":
        return Runner(name, sys.executable, TRAIN, {**PLAIN, "fp8": False})
    if name not in PEERS:
        raise SystemExit(f"--compare {wanted}: no peer is called `{name}`. Write one of: plain, {', '.join(PEERS)}.")
    located = shutil.which(python or sys.executable)
    if located is None:
        raise RunError(f"There is no program {python}.")
    runner = Runner(name, os.path.abspath(located), (str(PEERS[name]),))
    found = package_of(runner, name, folder)
    if found is None:
        raise RunError(
            f"{runner.python} cannot import `{name}`. Install it there, or name the python of an environment that has it: "
            f"--compare {name}=/path/to/python"
        )
    if name == "axolotl" and found == package_of(Runner("", sys.executable, ()), name, folder):
        raise RunError(
            f"The axolotl of {runner.python} is the one that is measured ({found}). Name the python of an environment that "
            "has the other: --compare axolotl=/path/to/python"
        )
    return runner


def package_of(runner: Runner, package: str, folder: Path) -> str | None:
    """The file that `import package` would run there, or None. Nothing of it is imported.

    Raises:
        RunError: the program is no python that runs.
    """
    code = f"import importlib.util as u; s = u.find_spec({package!r}); print(s.origin if s else '')"
    command = [runner.python, "-c", code]
    try:
        done = subprocess.run(command, env=runner.environment(), cwd=folder, capture_output=True, text=True)
    except OSError as error:
        raise RunError(f"{runner.python} does not run: {error}") from error
    if done.returncode:
        raise RunError(f"{runner.python} is no python that runs.", done.stderr.splitlines()[-LOG_LINES:])
    return done.stdout.strip() or None


def train(runner: Runner, config: Path, cache: Path, steps: int, limit_seconds: float) -> dict[str, Any]:
    """Run one YAML to its end. Returns when it began, what the clock noted, and whether compiled code was found.

    Args:
        runner: what trains it.
        config: the YAML; the clock's notes and the log are written beside it.
        cache: folder of compiled code.
        steps: what the YAML asks for.
        limit_seconds: when the run is killed.

    Raises:
        RunError: it failed, took too long, or did not train that many steps.
    """
    stamps, log = config.with_suffix(".stamps.jsonl"), config.with_suffix(".log")
    stamps.unlink(missing_ok=True)
    warm = cache.is_dir()
    environment = runner.environment() | {
        STEP_CLOCK: str(stamps),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    cache.mkdir(parents=True, exist_ok=True)
    began = time.time()
    ending = run_alone([runner.python, *runner.words, str(config)], environment, log, limit_seconds)
    lines = [json.loads(line) for line in complete_lines(stamps)]
    reason = what_went_wrong(ending, lines[1:], steps)
    if reason:
        raise RunError(f"{runner.name} {reason}", end_of(log), log)
    return {
        "began": began,
        "versions": lines[0]["versions"],
        "steps": lines[1:],
        "compile_cache": "warm" if warm else "cold",
    }


def run_alone(command: list[str], environment: dict[str, str], log: Path, limit_seconds: float) -> str | None:
    """Run a program beside its log until it ends. Returns how it ended, or None where it ended well.

    Processes that it left behind are killed, as they might hold the memory that the next one needs.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            return f"was killed after {limit_seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" if code else None


def what_went_wrong(ending: str | None, logged: list[dict[str, Any]], steps: int) -> str | None:
    """Why the steps that the clock noted are no run of `steps` steps, or None where they are."""
    if ending:
        return f"{ending}, {len(logged)} of {steps} steps done."
    numbers = [line["step"] for line in logged]
    if numbers != list(range(1, steps + 1)):
        shown = f"{numbers[:5]} .. {numbers[-1]}" if len(numbers) > 6 else numbers
        return f"ended well, but its log has the steps {shown}, where 1 to {steps} were asked for."
    for line in logged:
        if not (math.isfinite(line["logs"]["loss"]) and line["logs"]["loss"] > 0):
            return f"logged a loss of {line['logs']['loss']} at step {line['step']}: it trained on nothing, or went astray."
    return None


def complete_lines(path: Path) -> list[str]:
    """The lines of a file, without one that a killed process did not finish. None where there is no file."""
    return path.read_text().split("\n")[:-1] if path.is_file() else []


def end_of(log: Path) -> list[str]:
    """The last lines of a log that say something: progress bars are left out."""
    text = re.split(r"[\r\n]+", log.read_text(errors="replace"))
    return [line for line in text if line.strip() and not PROGRESS.search(line)][-LOG_LINES:]
