"""One row of the speed table: train its workload from plain YAML, beside other frameworks if asked to, and record both.

    python benchmarks/row.py --list
    python benchmarks/row.py lora-8b
    python benchmarks/row.py lora-8b --compare trl axolotl=/envs/axolotl/bin/python
    python benchmarks/row.py lora-8b --starts 2                      # the first start compiles, the second finds it compiled
    python benchmarks/row.py lora-8b-fp8 --steps 200 --compare plain --data train.jsonl --tokenizer phi-3-mini
    python benchmarks/row.py lora-8b --shape tiny --sequence-len 64 --steps 6 --compare trl      # on a CPU, in a minute

A model of random weights and tokenized rows are written to `--work`, and `axolotl train` runs a YAML that names them, in a process
of its own. A plugin of that YAML notes when each line of the trainer's log comes (`step_clock.py`): a step lasts from line to line,
data and logging included. The rate is the median of steps 4 to 12; the first step counts from the start of the process.

`--compare PEER[=PYTHON]` runs the same rows, model and batch in another framework (`benchmarks/peers`), timed by the same clock:
`trl`, `unsloth`, `llamafactory`, `axolotl` (the existing one, from the environment of another python), or `plain`, which is this
package with bf16 weights, without the compiler and the LoRA kernels: what the losses are held against. PYTHON is the one that runs
this script unless named. A row with an fp8 base is compared with bf16, as no peer has it. A peer that is not there or fails has its
reason and the end of its log in the record, in place of numbers; the others are measured.

Rows are random ids: full ones of `sequence_len`, or, packed, documents with the lengths of GSM8K. With `--data` (JSONL of `question`
and `answer`) and `--tokenizer` they are that text. Writes `benchmarks/results/<device>-row-<name>.json`; in the name is what was
changed on the command line, and `flash4` where the package flash-attn-4 computes attention.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from common import DATASHEET_TFLOPS, DEVICE, HERE, SHAPES, device_slug, flop_per_token, matmul_tflops, record_head
from rows import ROWS, Row, described
from runners import PEERS, TRAIN, RunError, Runner, find_runner, train
from step_clock import TOKENS_OF_ROWS
from transformers import LlamaConfig
from workload import make_base, random_documents, read_documents, write_config, write_rows

from axolotl.monkeypatch.attention.flash4 import is_usable

PRODUCT = "product"
FIRST, LAST = 4, 12  # measured steps
# Tokens since the start without padding, by their names in the log, and who counts them.
TOKEN_COUNTS = {"tokens/total": "trainer", "num_tokens": "trainer", TOKENS_OF_ROWS: "rows"}


def tokens_of_steps(steps: list[dict[str, Any]], full: int) -> tuple[list[int], str]:
    """Tokens of each step without padding, and who counted them. If nobody did, rows count as full."""
    for name, counted in TOKEN_COUNTS.items():
        if all(name in step["logs"] for step in steps):
            counts = [0, *(int(step["logs"][name]) for step in steps)]
            return [after - before for before, after in itertools.pairwise(counts)], counted
    return [full] * len(steps), "full rows"


def summarize(run: dict[str, Any], row: Row, flop: float, matmul: float) -> dict[str, Any]:
    """The numbers of one run."""
    steps = run["steps"]
    times = [run["began"], *(step["time"] for step in steps)]
    seconds = [after - before for before, after in itertools.pairwise(times)]
    tokens, counted = tokens_of_steps(steps, row.micro_batch_size * row.accumulation * row.sequence_len)
    measured = range(FIRST - 1, min(LAST, len(steps)))
    rate = statistics.median(tokens[i] / seconds[i] for i in measured)
    peaks = [step["peak_gib"] for step in steps if step["peak_gib"] is not None]
    logged = [step["logs"].get("tokens/per_sec_per_gpu") for step in steps]
    tflops = rate * flop / 1e12
    return {
        "tokens_per_second": round(rate, 1),
        "tokens_per_second_logged": statistics.median([logged[i] for i in measured]) if all(logged) else None,
        "peak_gib": round(max(peaks), 2) if peaks else None,
        "tflops": round(tflops, 3),
        "of_datasheet": round(tflops / DATASHEET_TFLOPS, 3),
        "of_measured_matmul": round(tflops / matmul, 3),
        "first_step_after_start_seconds": round(seconds[0], 2),
        "compile_cache": run["compile_cache"],
        "tokens_counted_by": counted,
        "tokens_per_step": round(statistics.mean(tokens), 1),
        "step_seconds": [round(value, 4) for value in seconds[1:]],
        "losses": [step["logs"]["loss"] for step in steps],
        "versions": run["versions"],
    }


@dataclasses.dataclass
class Bench:
    """One row on this machine: its files, and how to measure a runner on it."""

    row: Row
    folder: Path
    base: Path
    model: LlamaConfig
    matmul: float
    data: Path | None = None
    tokenizer: str | None = None
    limit_seconds: float = 1800

    def measure(self, runner: Runner, starts: int = 1) -> dict[str, Any]:
        """The numbers of `runner`: of its last start, or of the longest row that fits."""
        if not self.row.lengths:
            return self._measure(runner, self.row, starts)
        tried: list[dict[str, Any]] = []
        best: dict[str, Any] = {}
        for length in self.row.lengths:
            try:
                result = self._measure(runner, dataclasses.replace(self.row, sequence_len=length), starts)
            except RunError as error:
                if not best:
                    raise
                reason = {} if error.out_of_memory else error.recorded()
                tried.append({"sequence_len": length, "fits": False, **reason})
                break
            best = {"longest_row": length, **result}
            numbers = {key: result[key] for key in ("tokens_per_second", "peak_gib")}
            tried.append({"sequence_len": length, "fits": True, **numbers})
        return {**best, "tried": tried}

    def _measure(self, runner: Runner, row: Row, starts: int) -> dict[str, Any]:
        folder = self.folder / str(row.sequence_len)
        folder.mkdir(exist_ok=True)
        documents = (
            read_documents(self.data, str(self.tokenizer), self.model.vocab_size)
            if self.data
            else random_documents(self.model.vocab_size, random.Random(0), row.sequence_len)
        )
        length = write_rows(folder / "rows.jsonl", row, documents)
        config = folder / f"{runner.name}.yml"
        precision = {} if DEVICE == "cuda" else {"bf16": False}  # the same everywhere; some CPUs have bf16 units
        write_config(config, row, self.base, folder / "rows.jsonl", **precision, **runner.keys)
        flop = flop_per_token(
            self.model,
            adapter="adapter" in row.keys,
            length=length,
            checkpointing=bool(row.keys.get("gradient_checkpointing")),
        )
        cache, results = self.folder / f"cache-{runner.name}", []
        for _ in range(starts):
            shutil.rmtree(config.with_suffix(""), ignore_errors=True)
            run = train(runner, config, cache, row.steps, self.limit_seconds)
            results.append(summarize(run, row, flop, self.matmul))
        shutil.rmtree(config.with_suffix(""), ignore_errors=True)  # weights of all sizes, of no use
        begun = [{key: one[key] for key in ("compile_cache", "first_step_after_start_seconds")} for one in results]
        return {**results[-1], "starts": begun}


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Our numbers over theirs, and the largest and mean distance of the losses as a share of theirs."""
    apart = [abs(a - b) / b for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
    return {
        "tokens_per_second": round(ours["tokens_per_second"] / theirs["tokens_per_second"], 3),
        "peak_gib": round(ours["peak_gib"] / theirs["peak_gib"], 3)
        if ours["peak_gib"] and theirs["peak_gib"]
        else None,
        **({"longest_row": round(ours["longest_row"] / theirs["longest_row"], 3)} if "longest_row" in ours else {}),
        "loss_difference_first": apart[0],
        "loss_difference_mean": statistics.mean(apart),
        "loss_difference_max": max(apart),
    }


def described_run(name: str, run: dict[str, Any]) -> str:
    if "error" in run:
        lines = [f"{name:13} failed: {run['error']}", *(f"{'':13} | {line}" for line in run.get("log_end", []))]
        return "\n".join(lines)
    longest = f"  longest row {run['longest_row']:,}" if "longest_row" in run else ""
    return (
        f"{name:13} {run['tokens_per_second']:>11,} tok/s  {run['peak_gib']} GiB  {run['tflops']:.1f} TFLOP/s "
        f"({run['of_datasheet']:.0%} of {DATASHEET_TFLOPS:.0f}, {run['of_measured_matmul']:.0%} of the matmul rate)  "
        f"first step after {run['first_step_after_start_seconds']} s ({run['compile_cache']} cache)  "
        f"loss {run['losses'][0]:.4f} .. {run['losses'][-1]:.4f}{longest}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=ROWS, metavar="row", help=f"one of: {', '.join(ROWS)}")
    parser.add_argument("--list", action="store_true", help="show the rows, their best peers and targets")
    parser.add_argument("--compare", nargs="+", default=[], metavar="PEER[=PYTHON]", help=f"plain, {', '.join(PEERS)}")
    parser.add_argument("--starts", type=int, default=1, help="times to start; all but the first find compiled code")
    parser.add_argument("--steps", type=int, help="in place of the row's; the compiler is off below 20")
    parser.add_argument("--shape", choices=SHAPES, help="in place of the row's")
    parser.add_argument("--sequence-len", type=int, help="in place of the row's")
    parser.add_argument("--micro-batch-size", type=int, help="in place of the row's")
    parser.add_argument("--accumulation", type=int, help="in place of the row's")
    parser.add_argument("--data", type=Path, help="JSONL of `question` and `answer`, with --tokenizer")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, with --data")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that one run may take")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmarks"), help="where models, rows and runs go")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if not args.list and args.name is None:
        parser.error("name a row, or --list them")
    if (args.data is None) != (args.tokenizer is None):
        parser.error("--data and --tokenizer go together")
    if args.steps is not None and args.steps < FIRST:
        parser.error(f"--steps {args.steps}: the rate is the median from step {FIRST} on")
    names = [wanted.partition("=")[0] for wanted in args.compare]
    if repeated := {name for name in names if names.count(name) > 1}:
        parser.error(f"--compare names {', '.join(sorted(repeated))} more than once")
    if args.starts < 1:
        parser.error(f"--starts {args.starts}: at least 1")
    return args


def main() -> int:
    args = parse()
    if args.list:
        print(*described(), sep="\n")
        return 0
    names = ("shape", "sequence_len", "micro_batch_size", "accumulation", "steps")
    changes = {name: value for name in names if (value := vars(args)[name]) is not None}
    if args.sequence_len:
        changes["lengths"] = ()
    row = dataclasses.replace(ROWS[args.name], **changes)

    folder = (args.work / args.name).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    runners: dict[str, Runner | RunError] = {PRODUCT: Runner(PRODUCT, sys.executable, TRAIN)}
    for wanted in args.compare:
        try:
            runner = find_runner(wanted, folder)
            runners[runner.name] = runner
        except RunError as error:
            runners[wanted.partition("=")[0]] = error
            print(f"{wanted}: {error} The others are measured.", file=sys.stderr)
    base = args.work.resolve() / f"base-{row.shape}"
    model = make_base(base, row.shape)
    matmul = matmul_tflops()
    bench = Bench(row, folder, base, model, matmul, args.data, args.tokenizer, args.limit)
    runs: dict[str, dict[str, Any]] = {}
    record = {
        **record_head(),
        "row": args.name,
        "workload": row.split()[0],
        "changed": list(changes),
        "data": "questions and answers" if args.data else "random ids",
        "targets": row.split()[1],
        "matmul_tflops": round(matmul, 3),
        "runs": runs,
        "ratio": {},
    }
    changed = [f"{name.replace('_', '-')}-{value}" for name, value in changes.items() if name != "lengths"]
    if is_usable(torch.device(DEVICE)):
        changed.append("flash4")
    slug = "-".join([device_slug(), "row", args.name, *changed, *(["text"] if args.data else [])])
    path = args.results / f"{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, runner in runners.items():
        try:
            if isinstance(runner, RunError):
                raise runner
            runs[name] = bench.measure(runner, args.starts if name == PRODUCT else 1)
        except RunError as error:
            runs[name] = error.recorded()
            if error.log:
                print(f"{name:13} its log: {error.log}")
        print(described_run(name, runs[name]), flush=True)
        if name != PRODUCT and not any("error" in runs[one] for one in (PRODUCT, name)):
            record["ratio"][name] = compared(runs[PRODUCT], runs[name])
            print(f"{'':13} ratio {record['ratio'][name]['tokens_per_second']}")
        path.write_text(json.dumps(record, indent=1) + "\n")  # after each, for a peer may take the machine with it
    print(path)
    return int(any("error" in run for run in runs.values()))


if __name__ == "__main__":
    sys.exit(main())
