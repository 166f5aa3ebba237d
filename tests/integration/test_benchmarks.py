"""`benchmarks/row.py`: its workloads load, its clock and search for the longest row count right, and TRL trains the same rows."""

from __future__ import annotations

import dataclasses
import importlib
import json
import random
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from datasets import load_from_disk
from transformers import LlamaConfig, TrainerState

from axolotl.cli.config import inspect_cfg
from axolotl.integrations.base import PluginManager
from axolotl.monkeypatch.compile_layers import runs_compiled
from axolotl.utils.gpus import capabilities_of

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = (
    "lora-8b", "lora-8b-fp8", "lora-8b-checkpointing", "qlora-8b", "qlora-8b-checkpointing", "lora-8b-packed", "lora-1b",
    "lora-1b-packed", "full-1b", "full-8b", "longest-row",
)  # fmt: skip


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of `benchmarks` as its scripts do. The plugins of this process stay as they were."""
    monkeypatch.setattr(PluginManager, "_instance", None)
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def write_yaml(load: Any, folder: Path, name: str) -> Path:
    """The YAML of a row over the shape of its model, without weights."""
    row = load("rows").ROWS[name]
    shape = load("common").SHAPES[row.shape]
    LlamaConfig(architectures=["LlamaForCausalLM"], max_position_embeddings=8192, **shape).save_pretrained(
        folder / "base"
    )
    row = dataclasses.replace(row, sequence_len=row.lengths[0]) if row.lengths else row
    load("workload").write_config(folder / "product.yml", row, folder / "base", folder / "rows.jsonl")
    return folder / "product.yml"


def test_every_row_of_the_table_is_there(load):
    assert tuple(load("rows").ROWS) == NAMES
    assert [line.split()[0] for line in load("rows").described()][1:] == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_a_config_that_runs_compiled_on_a_gpu_with_the_memory_knobs_it_names(load, tmp_path, name):
    cfg = inspect_cfg(write_yaml(load, tmp_path, name), machine=capabilities_of("h200"))
    config = LlamaConfig.from_pretrained(tmp_path / "base")
    assert runs_compiled(cfg, config, has_gpu=True) or name == "full-8b"
    assert cfg.optimizer == ("adamw_bnb_8bit" if name == "full-8b" else "adamw_torch_fused")
    assert bool(cfg.gradient_checkpointing) == (name in ("full-8b", "longest-row") or name.endswith("-checkpointing"))
    assert bool(cfg.sample_packing) == (name == "longest-row" or name.endswith("-packed"))
    assert (cfg.adapter or "full") == {"longest": "lora"}.get(name.split("-")[0], name.split("-")[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_for_the_existing_implementation_has_its_fast_kernels_and_known_keys(load, tmp_path, name):
    cfg = load("run_axolotl").translated(yaml.safe_load(write_yaml(load, tmp_path, name).read_text()))
    (tmp_path / "translated.yml").write_text(yaml.safe_dump(cfg))
    read = inspect_cfg(tmp_path / "translated.yml", machine=capabilities_of("h200"))
    assert read.liger_fused_linear_cross_entropy
    assert read.fp8 is None
    assert bool(read.lora_mlp_kernel) == (not name.startswith("full"))


def test_documents_packed_for_llamafactory_are_all_there_and_begin_again(load):
    pack = load("run_llamafactory").pack
    documents = [{"input_ids": [n] * n, "labels": [-100] + [n] * (n - 1)} for n in (5, 3, 8, 2, 7, 4, 4, 1)]
    rows = list(pack(documents, 8))
    assert len(rows) == 5  # 34 tokens
    assert {len(values) for row in rows for values in row.values()} == {16}  # room for 8, and padding
    ids = [n for row in rows for n, number in zip(row["input_ids"], row["attention_mask"], strict=True) if number]
    assert sorted(ids) == sorted(n for one in documents for n in one["input_ids"])
    for row in rows:
        size = sum(number > 0 for number in row["attention_mask"])
        assert size <= 8
        assert (
            row["attention_mask"][size:] == row["position_ids"][size:] == row["input_ids"][size:] == [0] * (16 - size)
        )
        assert row["labels"][size:] == [-100] * (16 - size)
        begins = [place for place, position in enumerate(row["position_ids"][:size]) if position == 0]
        assert [row["attention_mask"][place] for place in begins] == list(range(1, len(begins) + 1))
        assert all(row["labels"][place] == -100 for place in begins)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_reach_llamafactory_in_their_order_with_the_tokens_of_each_step(load, tmp_path, monkeypatch, packed):
    module = load("run_llamafactory")
    sizes = [8, 8, 8, 8] if not packed else [3, 5, 8, 2, 4, 1]
    documents = [{"input_ids": [5] * n, "labels": [-100] + [5] * (n - 1), "attention_mask": [1] * n} for n in sizes]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in documents))
    cfg = {"datasets": [{"path": str(path)}], "sequence_len": 8, "sample_packing": packed}
    lengths = [sum(number > 0 for number in row["attention_mask"]) for row in module.save_rows(cfg, tmp_path / "saved")]
    saved = load_from_disk(tmp_path / "saved")["train"]
    assert set(saved.column_names) == {*module.COLUMNS, *(["position_ids"] if packed else [])}
    assert lengths == ([8, 8, 7] if packed else sizes)
    assert [sum(number > 0 for number in mask) for mask in saved["attention_mask"]] == lengths
    monkeypatch.setenv("STEP_CLOCK", str(tmp_path / "stamps.jsonl"))
    step_clock = load("step_clock")
    tokens = step_clock.tokens_by_step(lengths, rows_per_step=2, steps=3)
    assert tokens == ([16, 7, 16] if packed else [16, 16, 16])
    clock = step_clock.StepClock(tokens)
    for step in (1, 2, 3):
        clock.on_log(None, TrainerState(global_step=step), None, logs={"loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "stamps.jsonl").read_text().splitlines()]
    assert load("row").tokens_of_steps(lines, full=0) == (tokens, "rows")


def test_rows_reach_trl_and_unsloth_with_a_mask_of_what_is_trained_on_and_nothing_else(load, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]}) + "\n"
    )
    rows = load("sft").read_rows({"datasets": [{"path": str(tmp_path / "rows.jsonl")}]})
    assert rows.to_list() == [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}]


def test_full_rows_are_cut_from_a_stream_and_packed_documents_keep_their_lengths(load, tmp_path):
    workload, row = load("workload"), dataclasses.replace(load("rows").ROWS["lora-1b"], sequence_len=8, steps=1)
    documents = iter([(list(range(10 * n, 10 * n + 6)), 2) for n in range(100)])
    assert workload.write_rows(tmp_path / "full.jsonl", row, documents) == 8
    full = [json.loads(line) for line in (tmp_path / "full.jsonl").read_text().splitlines()]
    assert [one["input_ids"] for one in full[:2]] == [[0, 1, 2, 3, 4, 5, 10, 11], [12, 13, 14, 15, 20, 21, 22, 23]]
    assert len(full) == row.micro_batch_size * row.accumulation
    assert all(one["labels"] == [-100, *one["input_ids"][1:]] for one in full)
    packed = dataclasses.replace(row, packed=True)
    lengths = iter([([5] * 2, 1), ([6] * 6, 2)] * 20)
    assert workload.write_rows(tmp_path / "packed.jsonl", packed, lengths) == pytest.approx((4 + 36) / 8, abs=0.1)
    first = json.loads((tmp_path / "packed.jsonl").read_text().splitlines()[1])
    assert first["labels"] == [-100, -100, 6, 6, 6, 6]


def test_documents_too_long_for_a_row_are_cut_with_their_labels_and_train_on_a_token_each(load, tmp_path):
    workload, row = load("workload"), dataclasses.replace(load("rows").ROWS["lora-1b"], sequence_len=8, steps=1)
    packed, path = dataclasses.replace(row, packed=True), tmp_path / "packed.jsonl"
    workload.write_rows(path, packed, iter([([5] * 20, 10)] * 20))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 9  # 64 tokens and a tenth more, of 8 each
    assert all(one["labels"] == [-100] * 7 + [5] and len(one["input_ids"]) == 8 for one in rows)
    documents = list(islice(workload.random_documents(100, random.Random(0), row_length=64), 200))
    assert statistics.mean(len(ids) for ids, _ in documents) < 16
    documents = list(islice(workload.random_documents(100, random.Random(0), row_length=8192), 200))
    assert statistics.mean(len(ids) for ids, _ in documents) == pytest.approx(200, rel=0.1)


def test_a_peer_that_cannot_be_run_is_named_with_the_reason(load, tmp_path):
    runners = load("runners")
    find_runner = runners.find_runner
    with pytest.raises(SystemExit, match=r"no peer is called `trll`\. Write one of: plain, trl, unsloth"):
        find_runner("trll", tmp_path)
    if importlib.util.find_spec("llamafactory") is None:
        with pytest.raises(
            runners.RunError, match=r"cannot import `llamafactory`\. Install it there, or name the python"
        ):
            find_runner("llamafactory", tmp_path)
    with pytest.raises(runners.RunError, match="is the one that is measured"):
        find_runner("axolotl", tmp_path)
    with pytest.raises(runners.RunError, match="There is no program /none/python"):
        find_runner("trl=/none/python", tmp_path)
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 127\n")
    broken.chmod(0o755)
    with pytest.raises(runners.RunError, match="is no python that runs") as caught:
        find_runner(f"trl={broken}", tmp_path)
    assert caught.value.recorded()["log_end"] == ["no such library"]
    broken.write_text("neither a script nor a program")
    with pytest.raises(runners.RunError, match="does not run: "):
        find_runner(f"trl={broken}", tmp_path)


def test_the_rate_is_the_median_of_steps_4_to_12_by_the_tokens_that_the_trainer_counted(load):
    row, summarize = load("rows").ROWS["lora-8b-packed"], load("row").summarize
    seconds = [50, 9, 9, *[2] * 5, *[4] * 4, *[100] * 3]
    times = [1000 + sum(seconds[: n + 1]) for n in range(len(seconds))]
    steps = [
        {"time": time, "step": n + 1, "peak_gib": 1.0 + n, "logs": {"loss": 2.0, "tokens/total": 30000 * (n + 1)}}
        for n, time in enumerate(times)
    ]
    run = {"began": 1000, "steps": steps, "versions": {}, "compile_cache": "cold"}
    result = summarize(run, row, 1e9, 30.0)
    assert result["tokens_per_second"] == 15000
    assert result["first_step_after_start_seconds"] == 50
    assert (result["peak_gib"], result["tokens_counted_by"]) == (15.0, "trainer")
    assert (result["tflops"], result["of_measured_matmul"]) == (15.0, 0.5)
    for step in steps:
        del step["logs"]["tokens/total"]
    result = summarize(run, row, 1e9, 30.0)
    assert (result["tokens_per_second"], result["tokens_counted_by"]) == (4 * 8192 / 2, "full rows")


FAKE = """
import json, os, sys, yaml
cfg = yaml.safe_load(open(sys.argv[1]))
if cfg["sequence_len"] > 64:
    sys.exit("Error: the device ran out of memory.")
import time
began = time.time()
with open(os.environ["STEP_CLOCK"], "w") as file:
    file.write(json.dumps({"time": began, "versions": {}}) + chr(10))
    for step in range(1, 7):
        line = {"time": began + step, "step": step, "peak_gib": cfg["sequence_len"], "logs": {"loss": 1.0}}
        file.write(json.dumps(line) + chr(10))
"""


BEGIN = """
import json, os, signal, subprocess, sys, time
file = open(os.environ["STEP_CLOCK"], "w")
def note(**line):
    print(json.dumps({"time": time.time(), **line}), file=file, flush=True)
note(versions={})
def steps(*numbers, loss=1.0):
    for number in numbers:
        note(step=number, peak_gib=None, logs={"loss": loss})
print("loading", end=chr(10) + "  0%|    | 0/3" + chr(13) + " 33%|   | 1/3" + chr(10))
"""
ENDINGS = {
    "print('no such layer', file=sys.stderr); sys.exit(3)": "ended with exit code 3, 0 of 3 steps done.",
    "steps(1, 2); file.write('{\"time\": 1'); file.flush(); os.kill(os.getpid(), 9)": "was killed by SIGKILL, 2 of 3 steps done.",
    "steps(1); time.sleep(600)": "was killed after {limit} s, 1 of 3 steps done.",
    "steps(1, 2)": "ended well, but its log has the steps [1, 2], where 1 to 3 were asked for.",
    "steps(1, 2, 2, 3)": "ended well, but its log has the steps [1, 2, 2, 3], where 1 to 3 were asked for.",
    "steps(1, 2); steps(3, loss=0.0)": "logged a loss of 0.0 at step 3: it trained on nothing, or went astray.",
    "steps(1); steps(2, 3, loss=float('nan'))": "logged a loss of nan at step 2: it trained on nothing, or went astray.",
}


@pytest.mark.parametrize("code", ENDINGS)
def test_a_run_without_numbers_leaves_its_reason_and_the_end_of_its_log_without_progress_bars(load, tmp_path, code):
    runners = load("runners")
    (tmp_path / "fake.py").write_text(BEGIN + code)
    runner = runners.Runner("fake", sys.executable, (str(tmp_path / "fake.py"),))
    for limit in (1, 4, 16) if "sleep" in code else (120,):
        with pytest.raises(runners.RunError) as caught:
            runners.train(runner, tmp_path / "fake.yml", tmp_path / "cache", steps=3, limit_seconds=limit)
        recorded = caught.value.recorded()
        if "0 of 3 steps" not in recorded["error"]:  # else a machine at work has not come to the step
            break
    said = ENDINGS[code].format(limit=limit)
    assert recorded["error"] == f"fake {said}"
    assert recorded["log_end"] == ["loading", *(["no such layer"] if "such layer" in code else [])]
    assert caught.value.log == tmp_path / "fake.log"
    shown = load("row").described_run("fake", recorded).splitlines()
    assert shown[0] == f"fake          failed: fake {said}"
    assert shown[-1].split(" | ")[1] == recorded["log_end"][-1]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_run_leaves_behind_is_killed(load, tmp_path):
    runners = load("runners")
    child = "child = subprocess.Popen(['sleep', '600']); print(child.pid, file=open('child', 'w')); steps(1, 2, 3)"
    (tmp_path / "fake.py").write_text(BEGIN + child)
    runner = runners.Runner("fake", sys.executable, (str(tmp_path / "fake.py"),))
    run = runners.train(runner, tmp_path / "fake.yml", tmp_path / "cache", steps=3, limit_seconds=60)
    assert [step["step"] for step in run["steps"]] == [1, 2, 3]
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 50  # of the 600 seconds that it sleeps
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(child)


def test_the_longest_row_is_the_last_that_fits_and_starts_find_compiled_code(load, tmp_path):
    row_module, rows = load("row"), load("rows")
    (tmp_path / "fake.py").write_text(FAKE)
    runner = row_module.Runner("fake", sys.executable, (str(tmp_path / "fake.py"),))
    row = dataclasses.replace(rows.ROWS["longest-row"], lengths=(32, 64, 128, 256))
    config = LlamaConfig(**load("common").SHAPES["tiny"])
    bench = row_module.Bench(row, tmp_path, tmp_path / "base", config, 1.0)
    result = bench.measure(runner, starts=2)
    assert result["longest_row"] == 64
    assert [(one["sequence_len"], one["fits"]) for one in result["tried"]] == [(32, True), (64, True), (128, False)]
    assert result["tokens_per_second"] == pytest.approx(64, rel=0.01)
    bench = dataclasses.replace(
        bench, row=dataclasses.replace(row, lengths=(), sequence_len=32), folder=tmp_path / "one"
    )
    bench.folder.mkdir()
    assert [start["compile_cache"] for start in bench.measure(runner, starts=2)["starts"]] == ["cold", "warm"]
    bench = dataclasses.replace(bench, row=dataclasses.replace(row, lengths=(128,)))
    with pytest.raises(row_module.RunError, match="fake ended with exit code 1, 0 of 6 steps done") as caught:
        bench.measure(runner)
    assert caught.value.out_of_memory
    assert caught.value.log_end == ["Error: the device ran out of memory."]


@pytest.mark.slow
def test_a_row_trains_from_yaml_with_the_losses_of_trl_while_another_peer_is_not_there(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "row.py"),
        "lora-8b",
        "--shape",
        "tiny",
        "--sequence-len",
        "64",
        "--steps",
        "5",
    ]
    command += [
        "--compare",
        "unsloth=/none/python",
        "trl",
        "--work",
        str(tmp_path / "work"),
        "--results",
        str(tmp_path / "results"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    (path,) = (tmp_path / "results").iterdir()
    record = json.loads(path.read_text())
    assert {"date", "command", "commit", "device", "versions", "workload", "targets", "matmul_tflops"} <= set(record)
    assert str(tmp_path) not in record["command"]
    assert record["runs"]["unsloth"] == {"error": "There is no program /none/python."}
    assert list(record["ratio"]) == ["trl"]
    product, trl = record["runs"]["product"], record["runs"]["trl"]
    assert product["losses"] == pytest.approx(trl["losses"], rel=1e-5)
    assert len(set(product["losses"])) == 5
    assert product["tokens_per_step"] == trl["tokens_per_step"] == 8 * 64
    assert product["tokens_counted_by"] == trl["tokens_counted_by"] == "trainer"
    assert product["first_step_after_start_seconds"] > max(product["step_seconds"])
    assert record["ratio"]["trl"]["tokens_per_second"] == pytest.approx(
        product["tokens_per_second"] / trl["tokens_per_second"], abs=1e-3
    )
