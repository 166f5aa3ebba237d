"""Train a Llama on GSM8K through the command line, full and LoRA, then merge and evaluate; record speed, memory and loss.

    python benchmarks/gsm8k_llama.py --data gsm8k/train.jsonl --tokenizer phi-3-mini --shape 1b --steps 200
    python benchmarks/gsm8k_llama.py ... --shape 8b --sequence-len 8192 --micro-batch-size 1 --accumulation 4 --steps 12 --train-only

The weights are random: what is shown is that losses fall, that merging and evaluating work, and how fast it runs (attention is not in
its FLOP). Workloads to compare with other frameworks are rows of `row.py`. Writes
`benchmarks/results/<device>-gsm8k-<shape>.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from common import DATASHEET_TFLOPS, HERE, SHAPES, device_slug, flop_per_token, matmul_tflops, record_head, save_base
from transformers import AutoTokenizer, LlamaConfig

LORA = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}
RUNS = {
    "full": {"learning_rate": 3e-4},
    "lora": {"learning_rate": 1e-3, **LORA},
    "lora-fp8": {"learning_rate": 1e-3, **LORA, "fp8": True},
    "lora-checkpointing": {"learning_rate": 1e-4, **LORA, "gradient_checkpointing": True},
    "lora-offloading": {"learning_rate": 1e-4, **LORA, "gradient_checkpointing": True, "activation_offloading": True},
    "full-8bit": {"learning_rate": 2e-5, "bf16": "full", "optimizer": "adamw_bnb_8bit", "gradient_checkpointing": True},
}


def make_base(folder: Path, tokenizer_path: str, shape: str, length: int) -> LlamaConfig:
    """A model of the shape; all but the largest have no more rows in their embeddings than the tokenizer fills."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    values = dict(SHAPES[shape])
    if shape != "8b":
        values |= {"vocab_size": -(-len(tokenizer) // 64) * 64, "tie_word_embeddings": True}
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **values,
    )
    save_base(folder, config, tokenizer, torch.bfloat16)
    return config


def make_config(folder: Path, name: str, args: argparse.Namespace) -> Path:
    config = {
        "base_model": str(folder / "base"),
        "datasets": [
            {
                "path": str(args.data),
                "type": {
                    "field_instruction": "question",
                    "field_output": "answer",
                    "format": "Question: {instruction}\nAnswer: ",
                    "no_input_format": "Question: {instruction}\nAnswer: ",
                },
            }
        ],
        "val_set_size": 0.02,
        "dataset_prepared_path": str(folder / "prepared"),
        "sequence_len": args.sequence_len,
        "sample_packing": True,
        "flash_attention": True,
        "bf16": "auto",
        "micro_batch_size": args.micro_batch_size,
        "gradient_accumulation_steps": args.accumulation,
        "max_steps": args.steps,
        "num_epochs": 100,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.05,
        "logging_steps": 1 if args.train_only else 5,
        "eval_strategy": "no",
        "save_strategy": "no",
        "seed": 42,
        "output_dir": str(folder / name),
        **RUNS[name],
    }
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def axolotl(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "axolotl.cli.main", *arguments], check=True)
    return time.perf_counter() - started


def history(output_dir: Path) -> list[dict]:
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def measure(folder: Path, name: str, model: LlamaConfig, args: argparse.Namespace, matmul: float) -> dict:
    config = str(make_config(folder, name, args))
    seconds = {"train": axolotl("train", config)}
    summary = None
    if not args.train_only:
        if "adapter" in RUNS[name]:
            seconds["merge"] = axolotl("merge-lora", config)
        seconds["evaluate"] = axolotl("evaluate", config)
        with (folder / name / "eval_summary.csv").open() as handle:
            summary = {row["metric"]: row["validation"] for row in csv.DictReader(handle)}
    logged = history(folder / name)
    rates = [entry["tokens/per_sec_per_gpu"] for entry in logged[2:] if "tokens/per_sec_per_gpu" in entry]
    result = {
        "steps": args.steps,
        "loss_first": logged[0]["loss"],
        "loss_last": logged[-1]["loss"],
        "losses": [entry["loss"] for entry in logged],
        "tokens_per_second": statistics.median(rates) if rates else None,
        "peak_gib": max((entry.get("memory/max_allocated (GiB)", 0) for entry in logged), default=None),
        "evaluation": summary,
        "wall_seconds": seconds,
    }
    if rates:
        flop = flop_per_token(
            model,
            adapter="adapter" in RUNS[name],
            length=0,
            checkpointing=bool(RUNS[name].get("gradient_checkpointing")),
        )
        tflops = result["tokens_per_second"] * flop / 1e12
        result |= {"tflops": tflops, "share_of_989": tflops / DATASHEET_TFLOPS, "share_of_matmul": tflops / matmul}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequence-len", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--train-only", action="store_true", help="neither merge nor evaluate; log every step")
    parser.add_argument("--work", type=Path, default=Path("outputs/gsm8k"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["full", "lora"])
    args = parser.parse_args()

    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    model = make_base(args.work / "base", args.tokenizer, args.shape, max(8192, args.sequence_len))
    matmul = matmul_tflops()
    record = {
        **record_head(),
        "shape": args.shape,
        "matmul_tflops": matmul,
        "runs": {name: measure(args.work, name, model, args, matmul) for name in args.runs},
    }
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{device_slug()}-gsm8k-{args.shape}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(
        json.dumps(
            {
                **record,
                "runs": {name: {k: v for k, v in run.items() if k != "losses"} for name, run in record["runs"].items()},
            },
            indent=1,
        )
    )
    print(path)


if __name__ == "__main__":
    main()
