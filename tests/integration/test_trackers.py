"""Experiment trackers, each the real library on a tiny run: what they are told, and that they cannot end a run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainerCallback

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.evaluate import evaluate
from axolotl.exceptions import ConfigError, TrackerError
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.train import train
from axolotl.utils.callbacks.build import find_callback
from axolotl.utils.callbacks.opentelemetry import OpenTelemetryMetricsCallback
from axolotl.utils.callbacks.trackers import check_trackers
from tests.integration.training_runs import make_trainer, run_on_ranks
from tests.tiny import make_tiny_base

SECRET = "s3cret-value-of-a-key"
# Keys of a config that hold secrets, in places that reach a tracker by themselves and not.
SECRET_KEYS = {"comet_api_key": SECRET, "hub_revision": f"https://me:{SECRET}@host/x"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model, and rows."""
    folder = tmp_path_factory.mktemp("base")
    make_tiny_base(folder / "model")
    rng = random.Random(0)
    pairs = [(rng.randint(0, 50), rng.randint(0, 50)) for _ in range(24)]
    rows = [{"instruction": f"add {a} and {b}", "input": "", "output": f"{a + b}"} for a, b in pairs]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def config(base, tmp_path, monkeypatch):
    """A function that writes a config and loads it. Everything that trackers keep goes to `tmp_path`."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    os.environ.update(WANDB_DIR=str(tmp_path), WANDB_DATA_DIR=str(tmp_path), TRACKIO_DIR=str(tmp_path / "trackio"))
    os.environ["COMET_OFFLINE_DIRECTORY"] = str(tmp_path / "comet")
    monkeypatch.setattr(sys, "argv", ["axolotl", "train", "config.yml", "--comet-api-key", SECRET])

    def load(**keys):
        cfg = {
            "base_model": str(base / "model"),
            "datasets": [{"path": str(base / "rows.jsonl"), "type": "alpaca"}],
            "dataset_prepared_path": str(base / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "val_set_size": 0.2,
            "sequence_len": 128,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 6,
            "learning_rate": 0.01,
            "optimizer": "adamw_torch",
            "lr_scheduler": "cosine",
            "warmup_steps": 1,
            "bf16": False,
            "logging_steps": 0.5,
            "eval_steps": 6,
            "save_strategy": "no",
            **keys,
        }
        (tmp_path / "config.yml").write_text(yaml.safe_dump(cfg))
        return load_cfg(tmp_path / "config.yml")

    yield load
    os.environ.clear()
    os.environ.update(before)


def run(cfg):
    return train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))


class Interfere(BasePlugin):
    """Adds a callback that the test gives."""

    callback: TrainerCallback | None = None

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [self.callback]


@pytest.fixture
def at_step():
    """A function that lets `act(trainer callback arguments)` happen at the end of a step of the next run."""
    manager = PluginManager.get_instance()
    before = dict(manager.plugins)

    def add(step, act):
        class Act(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step:
                    act()

        plugin = Interfere()
        plugin.callback = Act()
        manager.plugins["interfere"] = plugin

    yield add
    manager.plugins.clear()
    manager.plugins.update(before)


def crash():
    raise RuntimeError("the test wants the run to fail")


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


ENDS = pytest.mark.parametrize("outcome", ["finished", "interrupted", "failed"])


def run_to(outcome, cfg, at_step):
    """Let a run end in one of the three ways."""
    if outcome == "finished":
        run(cfg)
    elif outcome == "interrupted":
        at_step(4, stop)
        with pytest.raises(SystemExit):
            run(cfg)
    else:
        at_step(4, crash)
        with pytest.raises(RuntimeError, match="wants the run to fail"):
            run(cfg)


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


# ---- Weights & Biases


def read_wandb(folder: Path) -> list[Any]:
    """The records of the offline run in a folder: a log in the format of LevelDB that holds protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, records, parts = path.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0:
            place += left
            continue
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


@ENDS
def test_wandb(config, tmp_path, at_step, outcome):
    pytest.importorskip("wandb")
    keys = {"wandb_project": "proj", "wandb_entity": "team", "wandb_name": "a name", "wandb_run_id": f"id{outcome}"}
    cfg = config(
        **keys,
        wandb_mode="offline",
        wandb_watch="gradients",
        wandb_log_model="false",
        mlflow_run_name="m",
        **SECRET_KEYS,
    )
    run_to(outcome, cfg, at_step)
    records = read_wandb(tmp_path)
    (begun,) = [record.run for record in records if record.HasField("run")]
    assert (begun.project, begun.entity, begun.display_name, begun.run_id) == ("proj", "team", "a name", f"id{outcome}")
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    steps = [entry["train/global_step"] for entry in history if "train/loss" in entry]
    assert steps == ([3, 6] if outcome == "finished" else [3])
    entry = next(entry for entry in history if "train/loss" in entry)
    assert {"train/learning_rate", "train/grad_norm", "train/tokens/per_sec_per_gpu", "train/epoch"} <= set(entry)
    artifacts = [record.request.log_artifact.artifact for record in records if record.request.HasField("log_artifact")]
    artifacts += [record.artifact for record in records if record.HasField("artifact")]
    assert f"config-id{outcome}" in [artifact.name for artifact in artifacts]
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [
        {"finished": 0, "interrupted": 130, "failed": 1}[outcome]
    ]
    assert files_with(SECRET, tmp_path / "wandb") == []


def test_wandb_gets_the_model_when_asked(config, tmp_path):
    pytest.importorskip("wandb")
    run(config(wandb_project="p", wandb_mode="offline", wandb_log_model="end"))
    artifacts = [record.artifact for record in read_wandb(tmp_path) if record.HasField("artifact")]
    names = [set(artifact.aliases) - {"latest"} for artifact in artifacts if artifact.type == "model"]
    assert names == [{"base_model"}, {"final_model"}]


def test_wandb_watches_the_model(config, tmp_path):
    """transformers asks for a histogram every hundred passes."""
    pytest.importorskip("wandb")
    keys = {"max_steps": 102, "logging_steps": 51, "eval_steps": None, "val_set_size": 0}
    run(config(wandb_project="p", wandb_mode="offline", wandb_watch=True, **keys))
    items = [item for record in read_wandb(tmp_path) for item in record.history.item]
    names = ["/".join(item.nested_key) or item.key for item in items if '"histogram"' in item.value_json]
    assert any("lm_head.weight/" in name for name in names), names  # wandb numbers what it watches
    assert {name.split("/")[0] for name in names} == {"gradients"}


def test_an_evaluation_reports_and_ends_its_run(config, tmp_path):
    wandb = pytest.importorskip("wandb")
    cfg = config(wandb_project="p", wandb_mode="offline", wandb_run_id="evaluated")
    metrics = evaluate(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    assert wandb.run is None
    records = read_wandb(tmp_path)
    items = {item.key or item.nested_key[0]: item.value_json for r in records for item in r.history.item}
    assert float(items["eval/loss"]) == metrics["eval_loss"]
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


def test_an_evaluation_finds_out_first_that_a_tracker_cannot_start(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    cfg = config(wandb_project="p", wandb_mode="online")
    cfg["base_model"] = "/nowhere"
    with pytest.raises(TrackerError, match=r"wandb login.*wandb_mode: offline"):
        evaluate(cfg=cfg, dataset_meta=None)


def test_without_a_login_wandb_says_so_at_once(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    cfg = config(wandb_project="p", wandb_mode="online")
    with pytest.raises(TrackerError, match=r"wandb login.*wandb_mode: offline"):
        check_trackers(cfg)


def test_a_run_that_is_not_ours_is_left_open(config):
    wandb = pytest.importorskip("wandb")
    cfg = config(wandb_project="p", wandb_mode="offline")
    theirs = wandb.init(project="theirs", mode="offline")
    run(cfg)
    assert wandb.run is theirs
    wandb.finish()


# ---- MLflow


@ENDS
def test_mlflow(config, tmp_path, at_step, outcome):
    mlflow = pytest.importorskip("mlflow")
    cfg = config(
        mlflow_tracking_uri=str(tmp_path / "mlruns"),
        mlflow_experiment_name="exp",
        mlflow_run_name="m",
        wandb_name="w",
        **SECRET_KEYS,
    )
    run_to(outcome, cfg, at_step)
    client = mlflow.MlflowClient(str(tmp_path / "mlruns"))
    (found,) = client.search_runs([client.get_experiment_by_name("exp").experiment_id])
    assert found.info.status == {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[outcome]
    assert found.info.run_name == "m"
    losses = client.get_metric_history(found.info.run_id, "loss")
    assert [metric.step for metric in losses] == ([3, 6] if outcome == "finished" else [3])
    assert found.data.params["learning_rate"] == "0.01"
    (artifact,) = client.list_artifacts(found.info.run_id)
    saved = yaml.safe_load(Path(client.download_artifacts(found.info.run_id, artifact.path)).read_text())
    assert saved["learning_rate"] == 0.01
    assert files_with(SECRET, tmp_path / "mlruns") == []


def test_an_mlflow_server_that_is_not_there_is_an_error_at_the_start(config):
    pytest.importorskip("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cfg = config(mlflow_tracking_uri=f"http://me:{SECRET}@127.0.0.1:{port}", mlflow_experiment_name="exp")
    cfg["base_model"] = "/nowhere/at/all"  # never reached
    with pytest.raises(TrackerError, match=r"`mlflow_tracking_uri: http://.*cannot be used") as raised:
        train(cfg=cfg, dataset_meta=None)
    assert SECRET not in str(raised.value)


def test_a_tracker_that_fails_on_the_way_does_not_end_the_run(config, tmp_path, at_step):
    pytest.importorskip("mlflow")
    cfg = config(mlflow_tracking_uri=str(tmp_path / "mlruns"), mlflow_experiment_name="exp", logging_steps=1)
    at_step(2, lambda: shutil.rmtree(tmp_path / "mlruns"))
    _, _, trainer = run(cfg)
    assert trainer.state.global_step == 6
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_it_is_said_once_that_a_tracker_failed(config, at_step, caplog):
    wandb = pytest.importorskip("wandb")
    cfg = config(wandb_project="p", wandb_mode="offline", logging_steps=1, max_steps=8)
    at_step(2, wandb.finish)
    _, _, trainer = run(cfg)
    assert trainer.state.global_step == 8
    assert caplog.text.count("Weights & Biases failed: ") == 1
    assert caplog.text.count("Weights & Biases failed 3 times in a row") == 1


# ---- TensorBoard


def test_tensorboard(config, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(config(use_tensorboard=True, **SECRET_KEYS))
    (path,) = (tmp_path / "out" / "runs").rglob("events.*")
    found = events.EventAccumulator(str(path))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [3, 6]
    assert [event.step for event in found.Scalars("eval/loss")] == [0, 6]
    (text,) = found.Tensors("axolotl_config/text_summary")
    assert b"learning_rate: 0.01" in text.tensor_proto.string_val[0]
    assert files_with(SECRET, path.parent) == []


# ---- Comet


@ENDS
def test_comet_offline(config, tmp_path, at_step, outcome):
    pytest.importorskip("comet_ml")
    cfg = config(comet_project_name="p", comet_online=False, comet_experiment_config={"tags": ["t"]}, **SECRET_KEYS)
    run_to(outcome, cfg, at_step)
    (path,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    messages = content["messages.json"].decode()
    losses = [line for line in messages.splitlines() if '"train/loss"' in line or '"loss"' in line]
    assert losses
    assert "axolotl-config" in messages
    assert f'"{outcome}"' in messages
    assert any(b"learning_rate: 0.01" in data for data in content.values())
    assert not any(SECRET.encode() in data for data in content.values())


def test_comet_without_a_key_says_so_at_once(config, monkeypatch, tmp_path):
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_CONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    cfg = config(comet_project_name="p", comet_online=True)
    with pytest.raises(TrackerError, match="comet_online: false"):
        check_trackers(cfg)


# ---- Trackio


def test_trackio(config, tmp_path):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    samples = {"generate_samples": True, "num_generation_samples": 2, "generation_max_new_tokens": 4}
    run(config(trackio_project_name="p", trackio_run_name="r", **samples, **SECRET_KEYS))
    (path,) = (tmp_path / "trackio").glob("p.db")
    tables = [entry["generated_samples"] for entry in SQLiteStorage.get_logs("p", "r") if "generated_samples" in entry]
    written = [json.loads(line) for line in (tmp_path / "out/generated_samples.jsonl").read_text().splitlines()]
    shown = [row["Predicted Completion (model.generate)"] for table in tables for row in table["_value"]]
    assert shown == [sample["generated"] for sample in written]
    assert [entry["train/global_step"] for entry in SQLiteStorage.get_logs("p", "r") if "train/loss" in entry] == [3, 6]
    assert SQLiteStorage.get_run_config("p", "r")["axolotl_config"]["learning_rate"] == 0.01
    assert files_with(SECRET, path.parent) == []


# ---- Prometheus


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=60) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name.partition("{")[0]: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@pytest.fixture
def free_port():
    """Below those that systems give to who asks for any, so that nobody else gets it meanwhile."""
    pytest.importorskip("opentelemetry.exporter.prometheus")
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            return port
    raise AssertionError("a hundred ports in use")


def test_prometheus_reads_a_run_while_it_goes(config, at_step, free_port):
    seen: dict[str, float] = {}
    at_step(4, lambda: seen.update(scrape(free_port)))
    _, _, trainer = run(config(use_otel_metrics=True, otel_metrics_port=free_port))
    logged = next(entry for entry in trainer.state.log_history if entry["step"] == 3 and "loss" in entry)
    for key, name in {
        "loss": "axolotl_train_loss",
        "learning_rate": "axolotl_learning_rate",
        "grad_norm": "axolotl_grad_norm",
        "tokens/per_sec_per_gpu": "axolotl_tokens_per_sec_per_gpu",
        "tokens/total": "axolotl_tokens_total",
    }.items():
        assert seen[name] == pytest.approx(float(logged[key])), name
    assert seen["axolotl_global_step"] == 4
    assert seen["axolotl_max_steps"] == 6
    assert seen["axolotl_epoch"] == pytest.approx(0.4)
    assert seen["axolotl_eval_loss"] > 0
    assert seen["process_resident_memory_bytes"] > 2**20
    with pytest.raises(OSError, match="refused"):
        scrape(free_port)


def test_the_endpoint_closes_when_a_run_fails_and_opens_again(config, at_step, free_port):
    cfg = config(use_otel_metrics=True, otel_metrics_port=free_port)
    at_step(1, crash)
    with pytest.raises(RuntimeError, match="wants the run to fail"):
        run(cfg)
    seen: dict[str, float] = {}
    at_step(4, lambda: seen.update(scrape(free_port)))
    run(cfg)
    assert seen["axolotl_global_step"] == 4


def test_a_port_in_use_is_an_error_before_the_model_is_loaded(config):
    pytest.importorskip("opentelemetry.exporter.prometheus")
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        cfg = config(use_otel_metrics=True, otel_metrics_port=port)
        cfg["base_model"] = "/nowhere/at/all"  # never reached
        with pytest.raises(ConfigError, match=rf"`otel_metrics_port: {port}` cannot.*otel_metrics_port: 0"):
            train(cfg=cfg, dataset_meta=None)


def serve_on_rank(folder: Path) -> bool:
    from axolotl.utils.dict import DictDefault

    opened: list[bool] = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            opened.append(served.is_running())

    served = OpenTelemetryMetricsCallback(DictDefault(otel_metrics_port=0))
    trainer = make_trainer(folder, max_steps=2, per_device_train_batch_size=2, callbacks=[served, Look()])
    trainer.train()
    assert find_callback(trainer, OpenTelemetryMetricsCallback) is served
    assert opened == [trainer.args.process_index == 0] * 2
    return opened[0]


def test_only_the_first_process_serves(tmp_path):
    pytest.importorskip("opentelemetry.exporter.prometheus")
    assert run_on_ranks(serve_on_rank, tmp_path)
