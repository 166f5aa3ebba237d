"""What a run says of itself: choices and size before it begins, `report.html` at its end, the config as it is saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from axolotl.core.trainers.mixins.token_loss import TokenLossMixin
from axolotl.loaders.quantization import count_parameters
from axolotl.utils.dict import DictDefault
from axolotl.utils.distributed import get_rank
from axolotl.utils.logging import get_logger
from axolotl.utils.redact import redact_secrets
from axolotl.utils.report import write_report

LOG = get_logger(__name__)

REPORT = "report.html"


def print_choices(cfg: DictDefault) -> None:
    """Show what was decided for the user, and why."""
    if get_rank() != 0 or not cfg.resolution:
        return
    table = Table(title="Choices made for this run", title_justify="left", box=None, pad_edge=False)
    for column in ("key", "value", "why"):
        table.add_column(column, overflow="fold")
    for entry in cfg.resolution:
        value = entry["value"]
        shown = value.to_dict() if isinstance(value, DictDefault) else value
        table.add_row(str(entry["key"]), json.dumps(shown, default=str), str(entry["reason"]))
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 160  # a log file has no width of its own
    console.print(table)


def print_size(model: Any, trainer: Any, total_num_steps: int | None) -> None:
    """Show how much is trained, and for how long."""
    trainable, total = count_parameters(model)
    args = trainer.args
    steps = args.max_steps if args.max_steps > 0 else total_num_steps
    LOG.info(
        f"Training {trainable:,} of {total:,} parameters ({100 * trainable / max(total, 1):.2f} %): {steps} steps, "
        f"{args.num_train_epochs:g} epochs, {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x "
        f"{args.world_size} rows per step."
    )


def save_report(cfg: DictDefault, trainer: Any) -> None:
    """Write `report.html`: the curves of the run, readable offline."""
    if get_rank() != 0:
        return
    with optional_file(Path(cfg.output_dir) / REPORT) as path:
        write_report(
            path,
            title=f"{Path(str(cfg.base_model)).name} · {Path(cfg.output_dir).name}",
            history=trainer.state.log_history,
            summary=summarize(cfg, trainer),
            config_yaml=config_as_yaml(cfg),
        )
        LOG.info(f"Report: {path}")


def summarize(cfg: DictDefault, trainer: Any) -> dict[str, Any]:
    """The figures of a run that head its report."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    rates = [entry["tokens/per_sec_per_gpu"] for entry in history if "tokens/per_sec_per_gpu" in entry]
    trainable, total = count_parameters(trainer.model)
    summary = {
        "base model": cfg.base_model,
        "adapter": cfg.adapter or "none (all weights)",
        "steps": f"{trainer.state.global_step} of {trainer.state.max_steps}",
        "epochs": round(trainer.state.epoch or 0, 3),
        "trainable parameters": f"{trainable:,} of {total:,} ({100 * trainable / max(total, 1):.2f} %)",
    }
    if isinstance(trainer, TokenLossMixin):
        summary["tokens seen"] = f"{trainer.num_tokens_seen:,}"
        summary["tokens trained"] = f"{trainer.num_tokens_trained:,}"
    if losses:
        summary["loss, first and last"] = f"{losses[0]:.4f} → {losses[-1]:.4f}"
    if evals:
        summary["evaluation loss, first and last"] = f"{evals[0]:.4f} → {evals[-1]:.4f}"
    if rates:
        summary["tokens per second and GPU, median"] = f"{sorted(rates)[len(rates) // 2]:,.0f}"
    return summary


@contextmanager
def optional_file(path: Path) -> Iterator[Path]:
    """A file that a run can do without: when it cannot be written, say so and go on."""
    try:
        yield path
    except OSError as error:
        LOG.warning(f"{path} could not be written: {error}. The trained model is saved.")


def config_as_yaml(cfg: DictDefault) -> str:
    """The resolved config as YAML, without secrets and without what the program found out for itself."""
    plain = redact_secrets({key: value for key, value in cfg.to_dict().items() if value is not None})
    for key in ("resolution", "capabilities", "env_capabilities"):
        plain.pop(key, None)
    # Through JSON, so that enums and dtypes become words that any YAML reader takes.
    return yaml.safe_dump(json.loads(json.dumps(plain, default=_as_word)), sort_keys=True, allow_unicode=True)


def _as_word(value: Any) -> str:
    return str(value).removeprefix("torch.")
