"""Runs over a stream, through the command line: packed and unpacked, killed and resumed, on one rank and on two."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from axolotl.cli.main import main
from axolotl.core.checkpoint import list_checkpoints
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.data.streaming import prepare_streaming_dataset, wrap_streaming_dataset
from axolotl.utils.dict import DictDefault
from tests.integration.object_store import serving_s3
from tests.integration.training_runs import CommandLine, make_trainer, steps_of, weights_of
from tests.tiny import CHATML, make_tiny_llama, make_tiny_tokenizer

FORMS = {
    "pretraining": {
        "pretraining_dataset": [
            {"path": "texts.jsonl", "type": "pretrain", "text_column": "body", "weight": 2},
            {"path": "more.jsonl", "type": "completion"},
        ]
    },
    "chat": {"streaming": True, "datasets": [{"path": "chats.jsonl", "type": "chat_template"}]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    make_tiny_tokenizer(folder / "model", chat_template=CHATML)
    make_tiny_llama(folder / "model")
    write(folder / "texts.jsonl", [{"body": f"text {i} " * (1 + i % 30)} for i in range(90)])
    write(folder / "more.jsonl", [{"text": f"more {i} " * (1 + i % 11)} for i in range(40)])
    chats = [
        [{"role": "user", "content": f"How much is {i}?"}, {"role": "assistant", "content": f"{i} " * (1 + i % 9)}]
        for i in range(70)
    ]
    write(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(folder: Path, name: str, form: str, **keys) -> Path:
    cfg = {
        "base_model": "model",
        "output_dir": name,
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "save_steps": 1,
        "save_total_limit": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "optimizer": "adamw_torch",
        "streaming_multipack_buffer_size": 20,
        "auto_resume_from_checkpoints": True,
        "bf16": False,
        "attention_dropout": None,
        **FORMS[form],
        **keys,
    }
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in cfg.items() if value is not None}))
    return path


def run(folder: Path, path: Path, num_ranks: int = 1) -> str:
    return start(folder, path, num_ranks).finish()


def start(folder: Path, path: Path, num_ranks: int = 1, program: Callable[[list[str]], Any] = main) -> CommandLine:
    command = ("train", path.name, "--launcher", "python")
    return CommandLine(*command, folder=folder, num_ranks=num_ranks, program=program)


def waits_to_be_killed(arguments: list[str]) -> None:
    """`axolotl`, which comes no further than into the step after its first checkpoint."""
    training_step = AxolotlTrainer.training_step

    def waiting(self, *args, **kwargs):
        if list_checkpoints(Path(self.args.output_dir)):
            time.sleep(600)
        return training_step(self, *args, **kwargs)

    AxolotlTrainer.training_step = waiting
    main(arguments)


def result(folder: Path, name: str) -> tuple[list, dict]:
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    steps = [[entry["step"], entry["epoch"], entry["loss"], entry["grad_norm"]] for entry in history if "loss" in entry]
    return steps, {key: value.tolist() for key, value in load_file(folder / name / "model.safetensors").items()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_resuming_a_stream_continues_bit_for_bit(tmp_path, packed, num_workers):
    def make(folder):
        trainer = make_trainer(
            folder,
            packed=packed,
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            ignore_data_skip=True,
            dataloader_num_workers=num_workers,
            model_config={"attention_dropout": 0.2},
        )
        cfg = DictDefault(
            sequence_len=64, micro_batch_size=2, sample_packing=packed, seed=1, streaming_multipack_buffer_size=9
        )
        cfg.pretraining_dataset = [{"type": "pretrain"}]
        texts = Dataset.from_list([{"text": f"text {i} " * (1 + i % 30)} for i in range(25)])
        trainer.train_dataset = wrap_streaming_dataset(texts, trainer.processing_class, cfg)
        return trainer

    whole = make(tmp_path)
    whole.train()
    assert whole.state.global_step == 6
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert steps_of(resumed) == steps_of(whole)
    assert resumed.num_tokens_seen == whole.num_tokens_seen
    for (name, ours), theirs in zip(weights_of(resumed).items(), weights_of(whole).values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.slow
def test_workers_on_a_store_read_every_row_once_and_resume(tmp_path):
    num_rows = 40
    with serving_s3("stream"):
        import s3fs

        for part in range(2):
            rows = "".join(json.dumps({"text": f"text {i} " * (1 + i % 9)}) + "\n" for i in range(part, num_rows, 2))
            s3fs.S3FileSystem().pipe_file(f"stream/rows/{part}.jsonl.gz", gzip.compress(rows.encode()))

        def make():
            trainer = make_trainer(
                tmp_path,
                max_steps=num_rows // 4,
                save_strategy="steps",
                save_steps=4,
                per_device_train_batch_size=4,
                ignore_data_skip=True,
                dataloader_num_workers=2,
            )
            cfg = DictDefault(sequence_len=128, micro_batch_size=4, seed=1, streaming_multipack_buffer_size=8)
            cfg.pretraining_dataset = [{"path": "s3://stream/rows", "type": "pretrain"}]
            trainer.train_dataset = prepare_streaming_dataset(cfg, trainer.processing_class)
            seen = []
            step = trainer.training_step

            def noting(model, inputs, *args):
                seen.extend(trainer.processing_class.batch_decode(inputs["input_ids"], skip_special_tokens=True))
                return step(model, inputs, *args)

            trainer.training_step = noting
            return trainer, seen

        whole, all_rows = make()
        whole.train()
        assert sorted({int(row.split()[1]) for row in all_rows}) == list(range(num_rows))
        assert len(all_rows) == num_rows
        resumed, rows = make()
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
        assert rows == all_rows[16:]
        assert steps_of(resumed) == steps_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, keys",
    [
        ("pretraining", {"sample_packing": True}),
        ("chat", {"dataloader_num_workers": 2}),
        ("chat", {"sample_packing": True, "multipack_real_batches": True}),
        ("pretraining", {"pretraining_sample_concatenation": True}),
    ],
    ids=["packed", "workers", "rows", "joined"],
)
def test_killed_run_goes_on_as_if_it_had_not_been(folder, request, form, keys):
    name = request.node.callspec.id
    run(folder, config(folder, f"{name}-whole", form, **keys))
    path = config(folder, f"{name}-killed", form, **keys)
    process = start(folder, path, program=waits_to_be_killed)
    deadline = time.monotonic() + 240
    while not list_checkpoints(folder / f"{name}-killed"):
        assert not process.ended(), process.output()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    last = list_checkpoints(folder / f"{name}-killed")[-1]
    assert int(last.name.rpartition("-")[2]) < 8
    run(folder, path)
    assert result(folder, f"{name}-killed") == result(folder, f"{name}-whole")


@pytest.mark.slow
def test_packed_stream_has_the_loss_of_an_unpacked_one(folder):
    """One block that is one step, whichever way its rows are laid out."""
    common = {"max_steps": 2, "streaming_multipack_buffer_size": 8, "sequence_len": 256, "save_steps": 2}
    run(folder, config(folder, "apart", "chat", micro_batch_size=8, gradient_accumulation_steps=1, **common))
    # Eight rows of this data fit into one row of 512.
    packed = {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "sample_packing": True, "flash_attention": True}
    run(folder, config(folder, "together", "chat", **packed, **common))
    ours, theirs = result(folder, "together")[0], result(folder, "apart")[0]
    assert [entry[2] for entry in ours] == pytest.approx([entry[2] for entry in theirs], abs=1e-5)


@pytest.mark.slow
def test_two_ranks_read_different_rows_and_resume(folder):
    keys = {"sample_packing": True, "ddp_backend": None, "max_steps": 4}
    run(folder, config(folder, "two-whole", "pretraining", **keys), num_ranks=2)
    whole = result(folder, "two-whole")
    states = [json.loads((folder / f"two-whole/checkpoint-4/stream_state_{rank}.json").read_text()) for rank in (0, 1)]
    assert [state["rank"] for state in states] == [0, 1]
    # What a run that was killed after step 2 leaves.
    for left in (3, 4):
        shutil.rmtree(folder / f"two-whole/checkpoint-{left}")
    run(folder, config(folder, "two-whole", "pretraining", **keys), num_ranks=2)
    assert result(folder, "two-whole") == whole
