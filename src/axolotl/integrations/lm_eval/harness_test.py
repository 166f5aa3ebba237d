"""Command lines of the harness, the process that runs them, and, where it is installed, a real evaluation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from axolotl.exceptions import AxolotlError, ConfigError, MissingExtraError
from axolotl.integrations.lm_eval.harness import (
    build_commands,
    check_harness,
    evaluate_with_harness,
    group_tasks,
    read_model_args,
)
from axolotl.integrations.lm_eval.plugin import LMEvalPlugin
from axolotl.utils.dict import DictDefault
from tests.tiny import make_tiny_base


def test_tasks_are_grouped_by_their_number_of_examples():
    assert group_tasks(["gsm8k", "arc_challenge:25", "hellaswag:25", "mmlu:5", "a/b:c.yaml"]) == {
        None: ["gsm8k", "a/b:c.yaml"],
        25: ["arc_challenge", "hellaswag"],
        5: ["mmlu"],
    }


class TestModelArgs:
    def test_what_the_run_wrote(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        cfg = DictDefault({"output_dir": str(tmp_path), "bf16": True, "hub_model_id": "me/model"})
        assert read_model_args(cfg) == {"pretrained": str(tmp_path), "dtype": "bfloat16"}
        cfg.lm_eval_model = "org/other"
        assert read_model_args(cfg)["pretrained"] == "org/other"

    def test_an_adapter_goes_on_its_base(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
        (tmp_path / "tokenizer_config.json").write_text("{}")
        cfg = DictDefault({"output_dir": str(tmp_path), "load_in_4bit": True, "fp16": True, "trust_remote_code": True})
        assert read_model_args(cfg) == {
            "pretrained": "org/base",
            "peft": str(tmp_path),
            "tokenizer": str(tmp_path),
            "load_in_4bit": True,
            "dtype": "float16",
            "trust_remote_code": True,
        }
        cfg.base_model = "/local/base"
        assert read_model_args(cfg)["pretrained"] == "/local/base"

    def test_the_hub_or_nothing(self, tmp_path):
        cfg = DictDefault({"output_dir": str(tmp_path), "hub_model_id": "me/model"})
        assert read_model_args(cfg) == {"pretrained": "me/model", "dtype": "auto"}
        with pytest.raises(ConfigError, match="lm_eval_model"):
            read_model_args(DictDefault({"output_dir": str(tmp_path)}))


def test_one_command_per_number_of_examples(tmp_path):
    cfg = DictDefault(
        {"lm_eval_model": "m", "lm_eval_tasks": ["a", "b:3"], "lm_eval_batch_size": "auto", "output_dir": str(tmp_path)}
        | {"use_wandb": True, "wandb_project": "p", "wandb_name": "n"}
    )
    first, second = build_commands(cfg)
    assert first[first.index("--tasks") + 1] == "a"
    assert "--num_fewshot" not in first
    assert second[second.index("--tasks") + 1] == "b"
    assert second[second.index("--num_fewshot") + 1] == "3"
    assert first[first.index("--batch_size") + 1] == "auto"
    assert first[first.index("--wandb_args") + 1] == "project=p,name=n"
    assert first[first.index("--output_path") + 1].startswith(f"{tmp_path}/lm_eval_results/")


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """A package `lm_eval` that writes down how it was run, and fails when asked to."""
    package = tmp_path / "site" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import json, os, sys, time\n"
        f"json.dump([sys.argv[1:], dict(os.environ)], open({str(tmp_path / 'run.json')!r}, 'w'))\n"
        "if 'wait' in sys.argv:\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "sys.exit(3 if 'fail' in sys.argv else 0)\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "run.json"


def test_after_training(harness, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0" if name == "RANK" else "1")
    cfg = DictDefault({"lm_eval_model": "m", "lm_eval_post_train": True, "output_dir": str(tmp_path)})
    plugin = LMEvalPlugin()
    plugin.post_train_unload(cfg)
    assert not harness.exists()  # no task
    cfg.lm_eval_tasks = ["a"]
    plugin.post_train_unload(DictDefault({**cfg, "lm_eval_post_train": False}))
    assert not harness.exists()
    plugin.post_train_unload(cfg)
    arguments, environment = json.loads(harness.read_text())
    assert json.loads(arguments[arguments.index("--model_args") + 1])["pretrained"] == "m"
    assert not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_ADDR"} & set(environment)
    cfg.lm_eval_tasks = ["fail"]
    with pytest.raises(AxolotlError, match="exit code 3"):
        plugin.post_train_unload(cfg)


def test_a_config_of_the_harness_alone(harness, tmp_path):
    LMEvalPlugin().evaluate(DictDefault({"lm_eval_model": "m", "lm_eval_tasks": ["a"], "output_dir": str(tmp_path)}))
    arguments, _ = json.loads(harness.read_text())
    assert arguments[arguments.index("--batch_size") + 1] == "8"
    with pytest.raises(ConfigError, match="lm_eval_tasks"):
        LMEvalPlugin().evaluate(DictDefault({"lm_eval_model": "m", "output_dir": str(tmp_path)}))
    with pytest.raises(ConfigError, match="lm_eval_task`"):
        LMEvalPlugin().evaluate(DictDefault({"lm_eval_model": "m", "lm_eval_task": ["a"]}))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=str)
def test_a_signal_ends_the_harness_too(harness, tmp_path, number):
    (tmp_path / "c.yml").write_text(f"lm_eval_model: m\nlm_eval_tasks: [wait]\noutput_dir: {tmp_path}\n")
    command = [sys.executable, "-m", "axolotl.cli.main", "lm-eval", str(tmp_path / "c.yml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = psutil.Process(next(int(line) for line in process.stdout if line.strip().isdigit()))
    process.send_signal(number)
    assert process.wait(240) == (-number if number == signal.SIGKILL else 128 + number)
    _, left = psutil.wait_procs([child], timeout=120 if number == signal.SIGKILL else 0)
    assert not left


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"axolotl\[lm-eval\]"):
        check_harness()
    with pytest.raises(MissingExtraError):
        LMEvalPlugin().add_callbacks_pre_trainer(
            DictDefault({"lm_eval_post_train": True, "lm_eval_tasks": ["a"]}), None
        )
    assert LMEvalPlugin().add_callbacks_pre_trainer(DictDefault({"lm_eval_post_train": False}), None) == []


TASK = """
task: tiny_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: a
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_a_real_evaluation(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_tiny_base(tmp_path / "out")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"q": question, "a": i}) for i, question in enumerate(("Is it?", "Was it?"))))
    (tmp_path / "task.yaml").write_text(TASK.format(rows=rows))
    cfg = DictDefault(
        {"output_dir": str(tmp_path / "out"), "lm_eval_tasks": [str(tmp_path / "task.yaml")], "lm_eval_batch_size": 1}
    )
    evaluate_with_harness(cfg)
    (results,) = (tmp_path / "out" / "lm_eval_results").rglob("results_*.json")
    assert "tiny_task" in json.loads(results.read_text())["results"]
