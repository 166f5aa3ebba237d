"""Trainers on tiny models and random rows, for the tests of this folder."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import multiprocessing
import os
import random
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
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


# Processes are forked from one that has imported the package, and that has no threads of ours and no CUDA context.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__, "axolotl.cli.preprocess", "axolotl.train", "axolotl.core.builders.causal"])


@atexit.register
def _end_ranks() -> None:
    """Wait for the end of the process that others are forked from. It takes seconds, in which the tests would leave it behind."""
    if forkserver._forkserver._forkserver_pid in (None, os.getpid()) or multiprocessing.parent_process() is not None:
        return
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    forkserver._forkserver._stop()


ROOT = Path(__file__).resolve().parents[2]
HANG_SECONDS = 240  # well below what a test may take; a rank that needs longer waits for what does not come


def start_process(target: Callable[..., Any], *arguments: Any) -> Any:
    """A process that runs a function of a module, forked from the one that has imported the package."""
    with contextlib.chdir(ROOT):  # where that one looks for `tests`, whichever folder a test is in
        forkserver.ensure_running()
    process = CONTEXT.Process(target=_as_a_process_of_its_own, args=(dict(os.environ), target, *arguments))
    process.start()
    return process


def _as_a_process_of_its_own(environment: dict[str, str], target: Callable[..., Any], *arguments: Any) -> None:
    """Do as a process that a launcher starts, but for ending with the tests: its workers are forked from itself."""
    set_aside()  # a collection would look at (and copy) all that was imported
    end_with_parent()
    multiprocessing.set_start_method("fork", force=True)
    os.environ.clear()  # it is that of the first test that started a process
    os.environ.update(environment)
    target(*arguments)


class Ranks:
    """A group of processes as a launcher makes it, each printing to a file.

    This process keeps the store that they meet at, so that the port is nobody else's from its choice to the end.

    Args:
        target: what each runs, a function of a module.
        arguments: what it is called with on each rank.
        outputs: the file of each rank.
    """

    def __init__(self, target: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], outputs: Sequence[Path]):
        self.outputs, num_ranks = outputs, len(outputs)
        self.store = Store() if num_ranks > 1 else None
        self.processes = []
        for rank, (given, output) in enumerate(zip(arguments, outputs, strict=True)):
            environment = self.store.environment(rank, num_ranks) if self.store else {}
            self.processes.append(start_process(_print_to, output, environment, target, *given))

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

    def finish(self, timeout: float = HANG_SECONDS + 20) -> str:
        """Wait for the end, which must be a good one, and return the output."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        assert not any(code is None or code for code in codes), f"exit codes {codes}\n{self.output()}"
        return self.output()


class Store:
    """What ranks meet at, in this process, as that of a launcher."""

    def __init__(self) -> None:
        self._server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def environment(self, rank: int, num_ranks: int) -> dict[str, str]:
        """What a launcher sets for each process of a group."""
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._server.port}
        kept_here = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        return {key: str(value) for key, value in (group | place | kept_here).items()}


def _print_to(output: Path, environment: Mapping[str, str], target: Callable[..., Any], *arguments: Any) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    faulthandler.dump_traceback_later(HANG_SECONDS)
    os.environ.update(environment)
    target(*arguments)


def _command_line(program: Callable[[list[str]], Any], arguments: tuple[str, ...], folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = ["axolotl", *arguments]
    program(list(arguments))


class CommandLine(Ranks):
    """`axolotl ARGUMENTS` in processes of its own, without the seconds that importing takes.

    Args:
        arguments: the command and what follows it.
        folder: where it is run.
        num_ranks: with more than one, a group of processes as a launcher makes it.
        program: what is run in the place of `axolotl`, a function of a module.
    """

    def __init__(self, *arguments: str, folder: Path, num_ranks: int = 1, program: Callable[[list[str]], Any] = main):
        outputs = [folder / f".output-{uuid.uuid4()}.txt" for _ in range(num_ranks)]
        super().__init__(_command_line, [(program, arguments, folder)] * num_ranks, outputs)


def _run_on_rank(function: Callable[[Path], Any], folder: Path) -> None:
    result = json.dumps(function(folder))
    (folder / "result.json").write_text(result)
    torch.distributed.destroy_process_group()


def run_on_ranks(function: Callable[[Path], Any], folder: Path, num_ranks: int = 2) -> Any:
    """Call `function(folder of the rank)`, a function of a module, in processes that form a gloo group.

    Returns:
        What the function returned on the first rank, by way of JSON.
    """
    folders = [folder / f"rank{rank}" for rank in range(num_ranks)]
    for rank_folder in folders:
        rank_folder.mkdir(parents=True)
    outputs = [rank_folder / "output.txt" for rank_folder in folders]
    Ranks(_run_on_rank, [(function, rank_folder) for rank_folder in folders], outputs).finish()
    return json.loads((folders[0] / "result.json").read_text())


def weights_of(trainer: AxolotlTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
