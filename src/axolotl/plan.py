"""What a run will do and need, before it costs anything.

In: a resolved `cfg`. Out: a `Plan`: the choices made and why, the patches, rows, tokens and exact steps (the data is
prepared, and cached for the run), parameters, and a forecast of the memory of one GPU. The model is built without weights
from its config; no GPU is needed and no weights are downloaded.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from axolotl.common.datasets import load_datasets
from axolotl.core.builders.arguments import read_schedule, read_warmup_steps
from axolotl.exceptions import MissingExtraError
from axolotl.loaders.utils import load_model_config
from axolotl.monkeypatch.ledger import rows_for
from axolotl.plan_run import build_blank_model, compiles_layers, has_gpu, offloads_by_default, read_run
from axolotl.utils.data.rows import count_trained_tokens
from axolotl.utils.data.steps import (
    build_multipack_sampler,
    data_parallel_size,
    num_steps_of_run,
    packing_summary,
)
from axolotl.utils.data.streaming import is_streamed
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.forecast import GIB, Forecast, Run, forecast
from axolotl.utils.gpus import ASSUMED_GPU, GPUS, find_gpu
from axolotl.utils.optimizers.table import check_optimizer
from axolotl.utils.remedies import Remedy, remedies
from axolotl.utils.samplers.utils import get_dataset_lengths
from axolotl.utils.schedulers import learning_rates

MAX_REMEDIES = 5
NO_REMEDY = "nothing that a key can change: use a larger GPU"
NOT_FORECAST = ("grpo", "gdpo", "ebft")  # they generate while they train


@dataclass
class DataPlan:
    """The rows of a run. Counts of tokens are None for rows that are tokenized while training.

    `total_num_steps` are those of all epochs, at most `max_steps`; `num_steps` those of the run.
    """

    num_rows: int | None = None
    num_eval_rows: int | None = None
    num_tokens: int | None = None
    num_trained_tokens: int | None = None
    longest: int | None = None
    num_bins: int | None = None
    packing_efficiency: float | None = None
    total_num_steps: int | None = None
    num_steps: int | None = None
    tokens_per_step: int | None = None


@dataclass
class Plan:
    """What `axolotl plan` shows.

    Args:
        choices: (key, value, reason) of what was chosen for the user.
        patches: (name, what) of the changes to other libraries.
        forecast: None for methods whose memory is not modelled, with the reason in `notes`.
        rates: learning rate of each step; empty when it is not known in advance.
        limit_gib: memory of the GPU that was named, or None.
        remedies: when it does not fit.
    """

    base_model: str
    method: str
    choices: list[tuple[str, Any, str]]
    patches: list[tuple[str, str]]
    data: DataPlan
    num_params: int
    num_trained: int
    rates: list[float] = field(default_factory=list)
    run: Run | None = None
    forecast: Forecast | None = None
    limit_gib: float | None = None
    gpu: str | None = None
    remedies: list[Remedy] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        """Whether the run fits the named memory; None when there is no forecast or no memory to compare with."""
        if self.forecast is None or self.limit_gib is None:
            return None
        return self.forecast.total <= self.limit_gib * GIB

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            _render(self, console)
        return capture.get()


def make_plan(cfg: DictDefault, *, memory_gib: float | None = None, gpu: str | None = None) -> Plan:
    """Plan the run of a resolved config.

    Args:
        cfg: from `load_cfg`, or from `inspect_cfg` for another machine: what was chosen for it is taken as it is.
        memory_gib: memory of one GPU. Wins over `gpu`.
        gpu: name of a GPU, a key of `GPUS` (spelling is forgiving: `H100`, `RTX 4090`).

    Raises:
        ConfigError: an unknown GPU, or an optimizer or schedule that cannot be as written.
        DatasetError: the data cannot be prepared.
    """
    limit = memory_gib if memory_gib is not None else GPUS[find_gpu(gpu)] if gpu else None
    notes: list[str] = []
    try:
        check_optimizer(cfg)
    except MissingExtraError as error:
        notes.append(str(error))  # only the machine that trains needs it
    model_config = load_model_config(cfg)
    model, adapted = build_blank_model(cfg, model_config)
    if cfg.torch_compile is None and compiles_layers(cfg, model_config):
        note_choice(cfg, "torch_compile", True, "each layer runs faster and keeps less; the first step waits for it")
    if cfg.gradient_checkpointing and offloads_by_default(cfg, model_config):
        note_choice(cfg, "activation_offloading", True, "the copies to host memory hide behind the layers")
    if gpu is None and has_gpu(cfg) and not torch.cuda.is_available():
        notes.append(f"this machine has no GPU: the choices are those on one {ASSUMED_GPU}; name yours with `--gpu`")
    data = plan_data(cfg, notes)
    rates = plan_rates(cfg, data.total_num_steps)
    num_params = sum(p.numel() for p in adapted.parameters())
    num_trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    plan = Plan(
        base_model=str(cfg.base_model),
        method=_method(cfg),
        choices=[(entry["key"], entry["value"], entry["reason"]) for entry in cfg.resolution or ()],
        patches=[(row.name, row.what) for row in rows_for(cfg)],
        data=data,
        num_params=num_params,
        num_trained=num_trained,
        rates=rates,
        limit_gib=limit,
        gpu=gpu,
        notes=notes,
    )
    if cfg.rl in NOT_FORECAST:
        notes.append(f"`rl: {cfg.rl}` generates while it trains; its memory is not forecast")
        return plan
    plan.run = read_run(cfg, model, adapted, data.longest)
    plan.forecast = forecast(plan.run)
    if plan.fits is False and limit is not None:
        plan.remedies = find_remedies(cfg, plan.run, limit * GIB)
    return plan


def find_remedies(cfg: DictDefault, run: Run, limit_bytes: float) -> list[Remedy]:
    """What would make a run smaller, best first: that fits, with the same result, with the least slowdown."""
    can_quantize = run.is_adapter and run.weight_bits == 16 and not cfg.fp8
    found = remedies(run, limit_bytes, micro_batch_size=int(cfg.micro_batch_size or 1), can_quantize=can_quantize)
    return found[:MAX_REMEDIES]


def describe_shortage(cfg: DictDefault, train_dataset: Any, free_bytes: float) -> str | None:
    """What to say before a run whose forecast does not fit its GPU; None when it fits or is not forecast.

    Args:
        cfg: the resolved config; nothing is noted in it.
        train_dataset: prepared rows, or a stream.
        free_bytes: memory of the GPU that the run can have.
    """
    if cfg.rl in NOT_FORECAST or cfg.auto_find_batch_size:
        return None
    cfg = copy.deepcopy(cfg)
    longest = None
    if isinstance(train_dataset, Dataset) and "input_ids" in train_dataset.column_names:
        longest = int(get_dataset_lengths(train_dataset).max(initial=0))
    run = read_run(cfg, *build_blank_model(cfg, load_model_config(cfg)), longest)
    needed = forecast(run).total
    if needed <= free_bytes:
        return None
    lines = [
        f"The forecast of this run is {needed / GIB:.1f} GiB, and the GPU has {free_bytes / GIB:.1f} GiB free: it will probably "
        "run out of memory. What would help, the least slowdown first (`axolotl plan` shows the parts):"
    ]
    for remedy in find_remedies(cfg, run, free_bytes):
        verdict = "" if remedy.forecast.total <= free_bytes else ", still too much"
        lines.append(f"  {remedy.change} ({remedy.forecast.total / GIB:.1f} GiB{verdict}, {remedy.effect})")
    if len(lines) == 1:
        lines.append(f"  {NO_REMEDY}")
    return "\n".join(lines)


def name_remedies(cfg: DictDefault) -> str:
    """The changes of a config that would save a tenth of its memory and more, best first, in one line."""
    cfg = copy.deepcopy(cfg)
    run = read_run(cfg, *build_blank_model(cfg, load_model_config(cfg)))
    found = find_remedies(cfg, run, 0.9 * forecast(run).total)
    return ", or ".join(f"`{remedy.change}`" for remedy in found) or NO_REMEDY


def plan_data(cfg: DictDefault, notes: list[str]) -> DataPlan:
    """Prepare the data, as the run will find it in its cache, and count it."""
    if is_streamed(cfg):
        notes.append("rows are streamed: their number is known only from `max_steps`")
        return DataPlan(total_num_steps=cfg.max_steps, num_steps=cfg.max_steps)
    meta = load_datasets(cfg=cfg)
    data = DataPlan(total_num_steps=meta.total_num_steps, num_steps=num_steps_of_run(cfg, meta.total_num_steps))
    data.num_rows = len(meta.train_dataset)
    data.num_eval_rows = len(meta.eval_dataset) if meta.eval_dataset is not None else 0
    if "input_ids" not in meta.train_dataset.column_names:
        return data
    lengths = get_dataset_lengths(meta.train_dataset)
    data.num_tokens, data.longest = int(lengths.sum()), int(lengths.max(initial=0))
    if "labels" in meta.train_dataset.column_names:
        data.num_trained_tokens = int(count_trained_tokens(meta.train_dataset).sum())
    if cfg.sample_packing:
        summary = packing_summary(build_multipack_sampler(meta.train_dataset, cfg))
        data.num_bins, data.packing_efficiency = summary["bins"], summary["efficiency"]
    if data.num_tokens and data.total_num_steps and cfg.num_epochs and not cfg.max_steps:
        per_rank = data.num_tokens * float(cfg.num_epochs) / data_parallel_size(cfg)
        data.tokens_per_step = round(per_rank / data.total_num_steps)
    return data


def plan_rates(cfg: DictDefault, total_num_steps: int | None) -> list[float]:
    """The learning rate of each step. Empty when the number of steps is unknown, or the rate follows evaluations."""
    steps = num_steps_of_run(cfg, total_num_steps) or 0
    if steps <= 0:
        return []
    return learning_rates(read_schedule(cfg), int(read_warmup_steps(cfg, total_num_steps or steps)), steps)


def draw_curve(values: list[float], width: int = 64, height: int = 6) -> list[str]:
    """A curve as lines of text, highest first: each column is the mean of its share of `values`, from 0 to the largest."""
    width = min(width, len(values))
    edges = [column * len(values) // width for column in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    top = max(values) or 1.0
    eighths = [round(mean / top * height * 8) for mean in means]
    return [
        "".join(" ▁▂▃▄▅▆▇█"[min(max(level - 8 * row, 0), 8)] for level in eighths) for row in reversed(range(height))
    ]


def _method(cfg: DictDefault) -> str:
    what = str(cfg.rl).upper() if cfg.rl else "reward model" if cfg.reward_model else "SFT"
    return f"{what}, {cfg.adapter or 'full fine-tuning'}"


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Show the plan on one screen."""
    _render(plan, console or Console())


def _render(plan: Plan, console: Console) -> None:
    console.print(f"[bold]{plan.method}[/bold] of {plan.base_model}")
    share = plan.num_trained / max(plan.num_params, 1)
    console.print(f"parameters  {plan.num_params:,}, trained {plan.num_trained:,} ({share:.2%})")
    data = plan.data
    if data.num_rows is not None:
        console.print(f"rows        {data.num_rows:,} to train, {data.num_eval_rows or 0:,} to evaluate")
    if data.num_tokens:
        trained = (data.num_trained_tokens or 0) / data.num_tokens
        console.print(
            f"tokens      {data.num_tokens:,}, trained {data.num_trained_tokens or 0:,} ({trained:.1%}), longest row {data.longest:,}"
        )
    if data.num_bins:
        console.print(f"packing     {data.num_bins:,} bins, {data.packing_efficiency or 0:.1%} full")
    if data.num_steps:
        per_step = f", about {data.tokens_per_step:,} tokens each on a GPU" if data.tokens_per_step else ""
        console.print(f"steps       {data.num_steps:,}{per_step}")
    if plan.rates:
        _render_schedule(plan.rates, console)
    for title, columns, rows in (
        ("chosen for you", ("key", "value", "because"), plan.choices),
        ("changes to other libraries", ("patch", "what"), plan.patches),
    ):
        if rows:
            table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
            for column in columns:
                table.add_column(column, overflow="fold")
            for row in rows:
                table.add_row(*(str(cell) for cell in row))
            console.print(table)
    if plan.forecast:
        _render_forecast(plan, plan.forecast, console)
    for note in plan.notes:
        console.print(f"note: {note}")


def _render_schedule(rates: list[float], console: Console) -> None:
    lines = draw_curve(rates)
    labels = [f"{max(rates):.3g}", *[""] * (len(lines) - 2), "0"]
    for label, line in zip(labels, lines, strict=True):
        console.print(f"{label or '':>11} {line}", highlight=False)
    peak = rates.index(max(rates))
    console.print(
        f"learning rate of steps 1 to {len(rates):,}: first {rates[0]:.3g}, highest at step {peak + 1:,}, last {rates[-1]:.3g}"
    )


def _render_forecast(plan: Plan, needed: Forecast, console: Console) -> None:
    unit, name = (GIB, "GiB") if needed.total >= GIB else (2**20, "MiB")
    table = Table(
        title=f"peak memory of one GPU, {name}", title_justify="left", box=None, pad_edge=False, header_style="dim"
    )
    for part in needed.parts:
        table.add_column(part, justify="right")
    table.add_column("total", justify="right")
    table.add_row(*(f"{size / unit:.2f}" for size in needed.parts.values()), f"[bold]{needed.total / unit:.2f}[/bold]")
    console.print(table)
    if plan.limit_gib is None:
        fitting = [name for name, size in sorted(GPUS.items(), key=lambda item: item[1]) if needed.total < size * GIB]
        console.print(f"fits: {', '.join(fitting[:6])}" if fitting else "fits no single GPU of the table")
        return
    where = f"{plan.gpu or 'the GPU'} ({plan.limit_gib:.1f} GiB)"
    if plan.fits:
        console.print(f"[green]fits {where}, {plan.limit_gib - needed.total / GIB:.1f} GiB to spare[/green]")
        return
    console.print(
        f"[red]does not fit {where}: {needed.total / GIB - plan.limit_gib:.1f} GiB too much[/red]. What would help:"
    )
    for remedy in plan.remedies:
        fits = remedy.forecast.total <= plan.limit_gib * GIB
        verdict = "[green]fits[/green]" if fits else "[red]still too large[/red]"
        console.print(f"  {remedy.change}: {remedy.forecast.total / GIB:.2f} GiB, {verdict} ({remedy.effect})")
    if not plan.remedies:
        console.print(f"  {NO_REMEDY}")
