"""Trainers on tiny models and random rows, for the tests of this folder."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import random
import socket
import sys
import uuid
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed

from axolotl.cli.main import main
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.utils.collators.batching import DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq
from axolotl.utils.garbage import set_aside
from axolotl.utils.processes import end_with_parent
from tests.tiny import make_tiny_model, make_tiny_tokenizer


def make_rows(
    num_rows: int = 32, seed: int = 0, vocab_size: int = 384, max_length: int = 40, silent: int | None = None
) -> Dataset:
    """Rows of different lengths, a random share of each masked; some train on their first token.

    Every `silent`-th row trains on nothing at all.
    """
    rng, rows = random.Random(seed), []
    for number in range(num_rows):
        length = rng.randint(5, max_length)
        ids = [rng.randrange(5, vocab_size) for _ in range(length)]
        masked = rng.choice([0, rng.randint(0, length - 2)])
        masked = length if silent and number % silent == 0 else masked
        rows.append(
            {
                "input_ids": ids,
                "labels": [-100] * masked + ids[masked:],
                "attention_mask": [1] * length,
                "position_ids": list(range(length)),
                "length": length,
            }
        )
    return Dataset.from_list(rows)


def make_trainer(
    folder: Path,
    *,
    packed: bool = False,
    model: Any = None,
    architecture: str = "llama",
    model_config: dict[str, Any] | None = None,
    rows: Dataset | None = None,
    lora: dict[str, Any] | None = None,
    callbacks: list[Any] | None = None,
    **args: Any,
) -> AxolotlTrainer:
    """An `AxolotlTrainer`, seeded like `train` seeds it: before the model and its adapter are made."""
    set_seed(42)
    tokenizer = make_tiny_tokenizer(folder / "tokenizer")
    if model is None:
        model = make_tiny_model(folder / "model", architecture, **(model_config or {}))
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        usual = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
        model = get_peft_model(model, LoraConfig(**{**usual, **lora}))
    rows = make_rows() if rows is None else rows
    training_args = AxolotlTrainingArguments(
        **{
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "logging_steps": 1,
            "report_to": "none",
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "optim": "adamw_torch",
            "sample_packing": packed,
            "multipack_real_batches": True,
            "max_seq_length": 64,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            **args,
        }
    )
    if packed:
        # Without a mask, transformers builds one from position ids that restart at each document.
        collator = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, drop_attention_mask=True)
    else:
        collator = DataCollatorForSeq2Seq(tokenizer)
    return AxolotlTrainer(
        model=model,
        args=training_args,
        train_dataset=rows if packed else rows.remove_columns("position_ids"),
        eval_dataset=rows.select(range(min(7, len(rows)))),
        data_collator=collator,
        eval_data_collator=collator,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def steps_of(trainer: AxolotlTrainer) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every logged step."""
    return [(entry["loss"], float(entry["grad_norm"])) for entry in trainer.state.log_history if "loss" in entry]


def evaluations_of(trainer: AxolotlTrainer) -> list[float]:
    """The loss of every evaluation."""
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


# Processes are forked from one that has imported the package, and that has no threads and no CUDA context.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload([__name__, "axolotl.cli.preprocess", "axolotl.train", "axolotl.core.builders.causal"])


@atexit.register
def _end_ranks() -> None:
    """Wait for the end of the process that others are forked from. It takes seconds, in which the tests would leave it behind."""
    if forkserver._forkserver._forkserver_pid in (None, os.getpid()) or multiprocessing.parent_process() is not None:
        return
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    forkserver._forkserver._stop()


def _become_a_process_of_its_own() -> None:
    """Do as a process that a launcher starts, but for ending with the tests: its workers are forked from itself."""
    set_aside()  # a collection would look at (and copy) all that was imported
    end_with_parent()
    multiprocessing.set_start_method("fork", force=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What a launcher sets for each process of a group."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    return {key: str(value) for key, value in group.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _command_line(
    program: Callable[[list[str]], Any],
    arguments: tuple[str, ...],
    folder: Path,
    environment: dict[str, str],
    output: Path,
) -> None:
    _become_a_process_of_its_own()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["axolotl", *arguments]
    program(list(arguments))


class CommandLine:
    """`axolotl ARGUMENTS` in processes of its own, without the seconds that importing takes.

    Args:
        arguments: the command and what follows it.
        folder: where it is run.
        num_ranks: with more than one, a group of processes as a launcher makes it.
        program: what is run in the place of `axolotl`, a function of a module.
    """

    def __init__(self, *arguments: str, folder: Path, num_ranks: int = 1, program: Callable[[list[str]], Any] = main):
        port, self.processes, self.outputs = _free_port(), [], []
        for rank in range(num_ranks):
            environment = _rank_environment(rank, num_ranks, port) if num_ranks > 1 else {}
            self.outputs.append(folder / f".output-{uuid.uuid4()}.txt")
            given = (program, arguments, folder, environment, self.outputs[-1])
            self.processes.append(RANKS.Process(target=_command_line, args=given))
            self.processes[-1].start()

    def ended(self) -> bool:
        return all(process.exitcode is not None for process in self.processes)

    def kill(self) -> None:
        """SIGKILL, at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def output(self) -> str:
        """What the processes have printed."""
        return "\n".join(output.read_text() for output in self.outputs if output.exists())

    def finish(self, timeout: float = 300) -> str:
        """Wait for the end, which must be a good one, and return the output."""
        for process in self.processes:
            process.join(timeout)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        assert not any(code is None or code for code in codes), f"{codes}\n{self.output()}"
        return self.output()


def _run_on_rank(function: Callable[[Path], Any], folder: Path, port: int, rank: int, num_ranks: int) -> None:
    _become_a_process_of_its_own()
    os.environ.update(_rank_environment(rank, num_ranks, port))
    result = json.dumps(function(folder))
    (folder / "result.json").write_text(result)
    torch.distributed.destroy_process_group()


def run_on_ranks(function: Callable[[Path], Any], folder: Path, num_ranks: int = 2) -> Any:
    """Call `function(folder of the rank)`, a function of a module, in processes that form a gloo group.

    Returns:
        What the function returned on the first rank, by way of JSON.
    """
    port, processes = _free_port(), []
    for rank in range(num_ranks):
        (folder / f"rank{rank}").mkdir(parents=True)
        arguments = (function, folder / f"rank{rank}", port, rank, num_ranks)
        processes.append(RANKS.Process(target=_run_on_rank, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join(timeout=300)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * num_ranks
    return json.loads((folder / "rank0" / "result.json").read_text())


def weights_of(trainer: AxolotlTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
