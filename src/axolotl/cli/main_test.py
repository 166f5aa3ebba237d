from __future__ import annotations

import inspect
import json
import os
import resource
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import axolotl
from axolotl.cli import main as main_module
from axolotl.cli.main import COMMANDS, cli, run

HEAVY = ("torch", "transformers", "datasets", "pydantic", "yaml", "numpy")


def run_python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240, **kwargs
    )


@pytest.mark.parametrize(
    "what",
    [
        "import axolotl.cli.main",
        "import axolotl.cli.main as m; assert m.run(['--help']) == 0",
        "import axolotl.cli.main as m; assert m.run(['--version']) == 0",
        "import axolotl.cli.main as m; assert m.run(['train', '--help']) == 0",
        "import axolotl.cli.main as m; assert m.run(['trian']) == 2",
    ],
)
def test_the_door_is_light(what):
    done = run_python(f"{what}\nimport sys, json\nprint('\\n' + json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_help_answers_at_once():
    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_python(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Of a processor, which others that want it change little. A slow machine slows down the bare interpreter just as much.
    command = "import sys; from axolotl.cli.main import main; main(['--help'])"
    pairs = [(seconds(command), seconds("import click")) for _ in range(7)]
    own, bare = (min(times) for times in zip(*pairs, strict=True))
    assert own < max(0.1, 2 * bare)


def test_every_command_is_listed_and_helps():
    runner = CliRunner()
    listing = runner.invoke(cli, ["--help"]).output
    for name, (_, help_line) in COMMANDS.items():
        assert name in listing
        result = runner.invoke(cli, [name, "--help"])
        assert result.exit_code == 0, result.output
        assert help_line.rstrip(".").split(",")[0] in " ".join(result.output.split())


def test_version():
    assert CliRunner().invoke(cli, ["--version"]).output == f"axolotl, version {axolotl.__version__}\n"


def test_documented_signatures():
    expected = {
        "evaluate": ["ctx", "config", "launcher", "kwargs"],
        "fetch": ["directory", "dest"],
        "inference": ["ctx", "config", "launcher", "gradio", "chat", "kwargs"],
        "merge_lora": ["config", "kwargs"],
        "preprocess": ["config", "cloud", "kwargs"],
        "train": ["ctx", "config", "launcher", "cloud", "sweep", "kwargs"],
    }
    for name, parameters in expected.items():
        command = getattr(main_module, name)
        assert isinstance(command, click.Command)
        assert list(inspect.signature(command.callback).parameters) == parameters
    assert isinstance(main_module.cli, click.Group)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["trian"], 2, "Did you mean `train`?"),
        (["xyzzy"], 2, "axolotl --help"),
        (["train"], 2, "Missing argument 'CONFIG'"),
        (["quantize", "c.yml"], 1, "`axolotl quantize` is known but not implemented here yet"),
        (["vllm_serve", "c.yml"], 1, "not implemented here yet"),
        (["train", "none.yml"], 1, "No such config: `none.yml`"),
        (["train", "http://x/c.yml"], 1, "https://"),
        (["train", "c.yml", "--launcher", "slurm"], 2, "--launcher"),
        (["train", "c.yml", "--cloud", "x.yml"], 1, "not implemented here yet"),
        (["inference", "c.yml", "--chat", "--gradio"], 2, "Choose one"),
        (["fetch", "weights"], 2, "deepspeed_configs"),
        (["plan", "c.yml", "--memory", "lots"], 1, "24GiB"),
    ],
)
def test_misuse_is_one_screen_and_a_code(args, code, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yml").write_text("base_model: x\n")
    assert run(args) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) < 10
    assert captured.out == ""


def test_config_errors_are_numbered(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yml").write_text("base_model: x\nlearning_rte: 1\nmicro_batch_size: many\n")
    assert run(["train", "c.yml"]) == 1
    err = capsys.readouterr().err
    assert "problems:\n  1. " in err
    assert "learning_rate" in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("config_options")
def test_an_unknown_flag_is_refused_before_anything_runs(capsys, tmp_path):
    path = tmp_path / "c.yml"
    path.write_text("base_model: x\n")
    assert run(["train", str(path), "--micro-batch-sise", "2"]) == 2
    assert "Did you mean `--micro-batch-size`?" in capsys.readouterr().err
    path.write_text("base_model: x\nplugins: [nowhere.Plugin]\n")
    assert run(["train", str(path), "--its-own-key", "2"]) == 1
    assert "nowhere.Plugin" in capsys.readouterr().err


@pytest.mark.usefixtures("config_options")
def test_train_help_lists_the_keys_by_group():
    output = CliRunner().invoke(cli, ["train", "--help"]).output
    assert "--micro-batch-size" in output
    assert "Tracking:\n  --wandb-name" in output


def test_a_package_adds_a_command_but_cannot_shadow_one(tmp_path, monkeypatch):
    folder = tmp_path / "extra-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[axolotl.cli_commands]\nhello = extra_cmd:hello\ntrain = extra_cmd:hello\n"
    )
    (tmp_path / "extra_cmd.py").write_text(
        "import click\n@click.command()\ndef hello():\n    click.echo('hello there')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    code = "import axolotl.cli.main as m; m.run(['--help']); m.run(['hello']); m.run(['train', '--help'])"
    output = run_python(code).stdout
    assert "From extra_cmd." in output
    assert "hello there" in output
    assert "Train or fine-tune a model." in output.split("hello there")[1]
