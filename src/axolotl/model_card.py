"""The model card of a trained model: README.md with front matter, hyperparameters, results and the config."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import yaml

from axolotl.core.trainers.utils import is_hub_name
from axolotl.utils.dict import DictDefault

HYPERPARAMETERS = (
    "learning_rate",
    "lr_scheduler",
    "warmup_steps",
    "optimizer",
    "weight_decay",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "num_epochs",
    "max_steps",
    "sequence_len",
    "sample_packing",
    "seed",
    "adapter",
    "lora_r",
    "lora_alpha",
)

FRAMEWORKS = ("axolotl", "torch", "transformers", "peft", "datasets", "tokenizers")

MAX_ROWS = 20


def write_model_card(path: Path, *, cfg: DictDefault, config_yaml: str, history: list[dict[str, Any]]) -> None:
    """Write the card.

    Args:
        path: the file, `README.md` in the folder of the model.
        cfg: the config.
        config_yaml: the same as text, without secrets.
        history: log entries of the trainer.
    """
    path.write_text(build_model_card(cfg, config_yaml, history), encoding="utf-8")


def build_model_card(cfg: DictDefault, config_yaml: str, history: list[dict[str, Any]]) -> str:
    """The text of the card."""
    name = (cfg.hub_model_id or Path(str(cfg.output_dir)).resolve().name).split("/")[-1]
    parts = [
        front_matter(cfg),
        f"# {name}",
        describe(cfg),
        "## Training hyperparameters",
        table(("key", "value"), [(f"`{key}`", cfg[key]) for key in HYPERPARAMETERS if cfg[key] is not None]),
    ]
    results = read_results(history)
    if results:
        parts += ["## Training results", table(("step", "epoch", "training loss", "evaluation loss"), results)]
    parts += [
        "## Framework versions",
        "\n".join(f"- {package} {version(package)}" for package in FRAMEWORKS),
        "## Config",
        f"<details><summary>axolotl config</summary>\n\n```yaml\n{config_yaml.rstrip()}\n```\n\n</details>",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(cfg: DictDefault) -> str:
    """The YAML head that the hub reads. A base model or dataset on the local disk is not a hub name and is left out."""
    meta: dict[str, Any] = {"library_name": "peft" if cfg.adapter else "transformers", "tags": ["axolotl"]}
    if cfg.base_model and not Path(str(cfg.base_model)).exists():
        meta["base_model"] = str(cfg.base_model)
    datasets = [str(d.path) for d in cfg.datasets or [] if is_hub_name(d.path)]
    if datasets:
        meta["datasets"] = datasets
    if cfg.adapter:
        meta["tags"].append("lora" if "lora" in str(cfg.adapter) else str(cfg.adapter))
    return f"---\n{yaml.safe_dump(meta, sort_keys=False)}---"


def describe(cfg: DictDefault) -> str:
    """One sentence on what was done."""
    how = f"a {cfg.adapter} adapter for" if cfg.adapter else "a fine-tuned version of"
    data = ", ".join(f"`{d.path}`" for d in cfg.datasets or cfg.pretraining_dataset or [] if d.path) or "its dataset"
    return f"This is {how} `{cfg.base_model}`, trained with axolotl on {data}."


def read_results(history: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Rows of the results table: evaluations with the training loss before them, or the last training losses."""
    rows: list[tuple[Any, ...]] = []
    loss: Any = "-"
    for entry in history:
        if "loss" in entry:
            loss = f"{entry['loss']:.4f}"
        if "eval_loss" in entry:
            rows.append((entry["step"], f"{entry.get('epoch', 0):.3f}", loss, f"{entry['eval_loss']:.4f}"))
    if not rows:
        rows = [(e["step"], f"{e.get('epoch', 0):.3f}", f"{e['loss']:.4f}", "-") for e in history if "loss" in e]
    stride = max(1, -(-len(rows) // MAX_ROWS))
    # The last row is the one people look for.
    return rows[::-1][::stride][::-1]


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def version(package: str) -> str:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
