"""Who trains a benchmark's YAML: this package, or a peer in its own process and environment, watched by one clock."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
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


class RunError(RuntimeError):
    """A run that ended badly. Holds the end of its log."""

    @property
    def out_of_memory(self) -> bool:
        return "out of memory" in str(self).lower()


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
        """That of this process, with the clock to import. Another python does not get this one's packages."""
        own = self.python == sys.executable
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep) if own else []
        paths = [str(HERE), *(str(Path(path).resolve()) for path in inherited if path)]
        return {
            "CUDA_VISIBLE_DEVICES": "0",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
        }


def find_runner(wanted: str, folder: Path) -> Runner:
    """The runner of one `--compare`.

    Raises:
        SystemExit: the peer is unknown, or its package is not in the environment of that python.
    """
    name, _, python = wanted.partition("=")
    if name == "plain":
        return Runner(name, sys.executable, TRAIN, {**PLAIN, "fp8": False})
    if name not in PEERS:
        raise SystemExit(f"--compare {wanted}: no peer is called `{name}`. Write one of: plain, {', '.join(PEERS)}.")
    located = shutil.which(python or sys.executable)
    if located is None:
        raise SystemExit(f"--compare {wanted}: there is no program {python}.")
    runner = Runner(name, os.path.abspath(located), (str(PEERS[name]),))
    found = package_of(runner, name, folder)
    if found is None:
        raise SystemExit(
            f"--compare {wanted}: {runner.python} cannot import `{name}`. Install it there, or name the python of an "
            f"environment that has it: --compare {name}=/path/to/python"
        )
    if name == "axolotl" and found == package_of(Runner("", sys.executable, ()), name, folder):
        raise SystemExit(
            f"--compare {wanted}: the axolotl of {runner.python} is the one that is measured ({found}). Name the python of "
            "an environment that has the other: --compare axolotl=/path/to/python"
        )
    return runner


def package_of(runner: Runner, package: str, folder: Path) -> str | None:
    """The file that `import package` would run there, or None. Nothing of it is imported."""
    code = f"import importlib.util as u; s = u.find_spec({package!r}); print(s.origin if s else '')"
    command = [runner.python, "-c", code]
    done = subprocess.run(command, env=runner.environment(), cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() or None


def train(runner: Runner, config: Path, cache: Path, limit_seconds: float) -> dict[str, Any]:
    """Run one YAML to its end. Returns when it began, what the clock noted, and whether compiled code was found.

    Args:
        runner: what trains it.
        config: the YAML; the clock's notes and the log are written beside it.
        cache: folder of compiled code.
        limit_seconds: when the run is killed.

    Raises:
        RunError: it failed, took too long, or ended without a step.
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
    with log.open("wb") as out:
        began = time.time()
        command = [runner.python, *runner.words, str(config)]
        try:
            code = subprocess.run(
                command, env=environment, cwd=config.parent, stdout=out, stderr=out, timeout=limit_seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"none, as it was killed after {limit_seconds:g} s,"
    lines = [json.loads(line) for line in stamps.read_text().splitlines()] if stamps.is_file() else []
    if code or len(lines) < 2:
        end = log.read_text(errors="replace")[-4000:]
        raise RunError(f"{runner.name} ended with exit code {code} after {max(0, len(lines) - 1)} steps. {log}:\n{end}")
    return {
        "began": began,
        "versions": lines[0]["versions"],
        "steps": lines[1:],
        "compile_cache": "warm" if warm else "cold",
    }
