from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from axolotl.cli.utils import train as launching
from axolotl.cli.utils.train import (
    build_command,
    choose_launcher,
    generate_config_files,
    launch_training,
    launcher_command,
    run_sweep,
)
from axolotl.exceptions import ConfigError, NotBuiltError


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "AXOLOTL_LAUNCHER", "AXOLOTL_LAUNCHER_ARGS"):
        monkeypatch.delenv(name, raising=False)


def test_build_command():
    options = {
        "learning_rate": 1e-4,
        "debug": True,
        "use_fp16": False,
        "trl__beta": 0.1,
        "nothing": None,
        "name": "a b",
    }
    assert build_command(["accelerate", "launch"], options) == [
        *("accelerate", "launch", "--learning-rate=0.0001", "--debug=True"),
        *("--use-fp16=False", "--trl.beta=0.1", "--name=a b"),
    ]


def test_accelerate_command():
    kwargs = {"num_processes": 2, "main_process_port": 1234, "seed": "3"}
    assert launcher_command("train", "c.yml", "accelerate", kwargs, ["--mixed_precision=no"]) == [
        *("accelerate", "launch", "--main_process_port", "1234", "--num_processes", "2", "--mixed_precision=no"),
        *("-m", "axolotl.cli.train", "c.yml", "--seed=3"),
    ]


def test_torchrun_gets_what_an_endpoint_needs():
    command = launcher_command("train", "c.yml", "torchrun", {}, ["--rdzv_endpoint", "host:1"])
    assert command[:5] == ["torchrun", "--rdzv_endpoint", "host:1", "--rdzv_backend", "c10d"]
    assert command[5] == "--rdzv_id"
    given = ["--rdzv-endpoint=host:1", "--rdzv-backend=static", "--rdzv-id=7"]
    assert launcher_command("train", "c.yml", "torchrun", {}, given) == [
        "torchrun",
        *given,
        "-m",
        "axolotl.cli.train",
        "c.yml",
    ]


def test_unknown_launcher():
    with pytest.raises(ConfigError, match="accelerate, torchrun, python"):
        launcher_command("train", "c.yml", "slurm", {}, [])


def test_the_default_launcher(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_launcher("train", {}, [])[0] == "python"
    assert choose_launcher("train", {}, ["--num_processes=2"])[0] == "accelerate"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_launcher("train", {}, []) == ("accelerate", "2 GPUs are visible")
    assert choose_launcher("inference", {}, [])[0] == "python"
    assert choose_launcher("train", {"use_ray": True}, [])[0] == "python"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert choose_launcher("train", {}, [])[0] == "python"
    monkeypatch.setenv("AXOLOTL_LAUNCHER", "torchrun")
    assert choose_launcher("train", {}, [])[0] == "torchrun"


def test_exec_replaces_the_process_and_finds_the_launchers_of_this_interpreter(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execvpe", lambda *args: calls.append(args))
    launch_training("c.yml", "accelerate", None, {"seed": "1"}, ["--num_machines=1"], use_exec=True)
    (file, command, env) = calls[0]
    assert file == "accelerate"
    assert command == ["accelerate", "launch", "--num_machines=1", "-m", "axolotl.cli.train", "c.yml", "--seed=1"]
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_launched_child_that_fails_is_an_error(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        launch_training(str(tmp_path / "none.yml"), "torchrun", None, {}, ["--no-such-option"])


def test_arguments_for_no_launcher_are_refused():
    with pytest.raises(ConfigError, match="--launcher python"):
        launch_training("c.yml", "python", None, {}, ["--num_processes=2"])
    with pytest.raises(NotBuiltError):
        launch_training("c.yml", "python", "cloud.yml", {})


def test_without_a_sweep_the_config_is_itself():
    assert list(generate_config_files("c.yml", None)) == [("c.yml", False)]


@pytest.fixture
def sweep_files(tmp_path):
    (tmp_path / "c.yml").write_text("base_model: m\noutput_dir: out\nseed: 1\n")
    (tmp_path / "sweep.yml").write_text("learning_rate: [0.1, 0.2]\ntrl.beta: [1, 2]\n")
    return str(tmp_path / "c.yml"), str(tmp_path / "sweep.yml")


def test_every_run_of_a_sweep_has_its_folder(sweep_files):
    runs = [
        (yaml.safe_load(Path(path).read_text()), is_group) for path, is_group in generate_config_files(*sweep_files)
    ]
    assert all(is_group for _, is_group in runs)
    assert [run["output_dir"] for run, _ in runs] == [f"out/sweep{number:04d}" for number in (1, 2, 3, 4)]
    assert {(run["learning_rate"], run["trl"]["beta"]) for run, _ in runs} == {(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)}


def test_a_failing_run_does_not_stop_the_sweep(sweep_files, monkeypatch):
    commands = []

    def fake_run(command, **kwargs):
        commands.append(command)
        return 3 if len(commands) == 2 else 0

    monkeypatch.setattr(launching, "run_child", fake_run)
    assert run_sweep(*sweep_files, "python", {"output_dir": "elsewhere", "seed": "2"}) == 1
    assert len(commands) == 4
    assert [command[-2] for command in commands] == [f"--output-dir=elsewhere/sweep{n:04d}" for n in (1, 2, 3, 4)]
    assert all(command[1:3] == ["-m", "axolotl.cli.train"] and "--seed=2" in command for command in commands)


def test_an_override_of_a_swept_key_is_refused(sweep_files):
    with pytest.raises(ConfigError, match=r"trl\.beta"):
        run_sweep(*sweep_files, "python", {"trl__beta": "3"})
