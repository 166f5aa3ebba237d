"""From text to a trained, merged, answering model, through the public command line: what `make quickstart` runs.

Each step is one `axolotl` command on a YAML beside this file; copy them for your own data.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = Path("quickstart-out")
QUESTIONS = ("What does os.path.join do?", "How do I call json.dumps?", "What does random.shuffle do?")


def step(title: str, *command: str, stdin: str | None = None) -> str:
    print(f"\n\033[1m{title}\033[0m\n  $ {' '.join(command)}", flush=True)
    done = subprocess.run(command, input=stdin, text=True, stdout=subprocess.PIPE if stdin is not None else None)
    if done.returncode:
        sys.exit(f"`{' '.join(command)}` failed with exit code {done.returncode}")
    return done.stdout or ""


def losses(output_dir: Path) -> tuple[float, float]:
    """First and last logged training loss of a run."""
    state = json.loads(max(output_dir.glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime).read_text())
    logged = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return logged[0], logged[-1]


def main() -> None:
    started = time.monotonic()
    os.chdir(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    shutil.rmtree(OUT, ignore_errors=True)
    yaml = {name: str((HERE / f"{name}.yml").relative_to(ROOT)) for name in ("pretrain", "sft")}

    step("1. Make text, questions, a tokenizer and a model shape", sys.executable, str(HERE / "make_data.py"), str(OUT))
    step("2. Pretrain from scratch", "axolotl", "train", yaml["pretrain"])
    step(
        "3. What the fine-tuning will do, before it costs anything", "axolotl", "plan", yaml["sft"], "--memory", "4GiB"
    )
    step("4. Fine-tune with LoRA", "axolotl", "train", yaml["sft"])
    step("5. Evaluate", "axolotl", "evaluate", yaml["sft"])
    step("6. Merge the adapter into the model", "axolotl", "merge-lora", yaml["sft"])
    for question in QUESTIONS:
        answer = step(
            "7. Ask", "axolotl", "inference", yaml["sft"], "--base-model", str(OUT / "sft" / "merged"), stdin=question
        )
        print(f"  {question}\n  -> {answer.strip()}", flush=True)

    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    for name in ("pretrained", "sft"):
        first, last = losses(OUT / name)
        print(f"  {name:<10} loss {first:.2f} -> {last:.2f}   report: {OUT / name / 'report.html'}")
        if last >= 0.8 * first:
            sys.exit(f"the loss of {name} did not fall: {first:.2f} -> {last:.2f}")


if __name__ == "__main__":
    main()
