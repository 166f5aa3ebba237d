"""The front door is light: `axolotl --help` loads nothing heavy, and every command answers `--help`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

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
    """Under 100 ms of a processor, which others that want it change little; a slow one slows down the bare interpreter, too."""
    bare, ours = [], []
    for _ in range(5):
        for timings, command in (
            (bare, [sys.executable, "-c", "import click"]),
            (ours, [sys.executable, "-m", "axolotl.cli.main", "--help"]),
        ):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            timings.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(ours) < 2.5 * min(bare) + 0.05


NOT_FOR_ROWS = (
    "bitsandbytes",
    "deepspeed",
    "mlflow",
    "peft",
    "torchao.quantization",
    "transformers.modeling_utils",
    "transformers.processing_utils",
    "transformers.trainer",
    "trl",
    "wandb",
)
"""What trains models or reads images. Each costs a good part of a second, and rows of text need none of it."""


def test_preprocess_loads_no_trainer_and_no_model(tmp_path):
    from tests.tiny import make_tiny_tokenizer

    make_tiny_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"instruction": "How many legs has a dog?", "output": "four"}) + "\n"
    )
    (tmp_path / "c.yml").write_text(
        json.dumps(
            {
                "base_model": str(tmp_path / "model"),
                "datasets": [{"path": str(tmp_path / "rows.jsonl"), "type": "alpaca"}],
                "dataset_prepared_path": str(tmp_path / "prepared"),
                "output_dir": str(tmp_path / "out"),
                "sequence_len": 512,
                "micro_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "num_epochs": 1,
                "learning_rate": 0.0001,
                "adapter": "lora",
                "lora_r": 8,
                "lora_alpha": 16,
                "lora_target_linear": True,
            }
        )
    )
    script = (
        f"import sys, json\nfrom axolotl.cli.main import run\ncode = run(['preprocess', {str(tmp_path / 'c.yml')!r}])\n"
        f"print('LOADED ' + json.dumps([code, [m for m in {NOT_FOR_ROWS!r} if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert "LOADED " in done.stdout, done.stderr
    assert json.loads(done.stdout.rsplit("LOADED ", 1)[1]) == [0, []], done.stderr


def commands() -> list[str]:
    from axolotl.cli.main import cli

    return sorted(cli.list_commands(None))


@pytest.mark.parametrize("command", commands())
def test_every_command_answers_help(command: str):
    done = subprocess.run([sys.executable, "-m", "axolotl.cli.main", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
