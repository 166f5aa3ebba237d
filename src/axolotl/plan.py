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
import transformers
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from axolotl._not_built import NO_EFFECT_YET, not_built_problems
from axolotl.common.datasets import load_datasets
from axolotl.core.builders.arguments import read_schedule, read_warmup_steps
from axolotl.core.builders.causal import DEFAULT_LOSS_CHUNKS
from axolotl.exceptions import ConfigError, MissingExtraError
from axolotl.loaders.adapter import LORA_ADAPTERS, build_lora_config
from axolotl.loaders.model import read_dtype, read_model_class
from axolotl.loaders.utils import load_model_config
from axolotl.monkeypatch.ledger import rows_for
from axolotl.monkeypatch.tiled_mlp import num_shards_for
from axolotl.utils.data.rows import count_trained_tokens
from axolotl.utils.data.steps import data_parallel_size, packing_summary
from axolotl.utils.data.streaming import is_streamed
from axolotl.utils.dict import DictDefault
from axolotl.utils.forecast import GIB, GPUS, Forecast, LayerShape, Remedy, Run, forecast, remedies
from axolotl.utils.optimizers.table import check_optimizer
from axolotl.utils.samplers.utils import get_dataset_lengths
from axolotl.utils.schedulers import learning_rates

PAIRED_LOSSES = ("dpo", "ipo", "orpo", "simpo", "kto")
REFERENCE_LOSSES = ("dpo", "ipo", "kto")
MAX_REMEDIES = 5


@dataclass
class DataPlan:
    """The rows of a run. Counts of tokens are None for rows that are tokenized while training."""

    num_rows: int | None = None
    num_eval_rows: int | None = None
    num_tokens: int | None = None
    num_trained_tokens: int | None = None
    longest: int | None = None
    num_bins: int | None = None
    packing_efficiency: float | None = None
    total_num_steps: int | None = None
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
        cfg: from `load_cfg`.
        memory_gib: memory of one GPU. Wins over `gpu`.
        gpu: name of a GPU, a key of `GPUS` (spelling is forgiving: `H100`, `RTX 4090`).

    Raises:
        ConfigError: an unknown GPU, or an optimizer or schedule that cannot be as written.
        DatasetError: the data cannot be prepared.
    """
    limit = memory_gib if memory_gib is not None else _memory_of(gpu)
    notes: list[str] = []
    try:
        check_optimizer(cfg)
    except MissingExtraError as error:
        notes.append(str(error))  # only the machine that trains needs it
    model_config = load_model_config(cfg)
    model, adapted = build_blank_model(cfg, model_config)
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
    if cfg.rl in ("grpo", "gdpo", "ebft"):
        notes.append(f"`rl: {cfg.rl}` generates while it trains; its memory is not forecast")
        return plan
    plan.run = read_run(cfg, model, adapted, data)
    plan.forecast = forecast(plan.run)
    if plan.fits is False and limit is not None:
        can_quantize = plan.run.is_adapter and plan.run.weight_bits == 16
        found = remedies(
            plan.run, limit * GIB, micro_batch_size=int(cfg.micro_batch_size or 1), can_quantize=can_quantize
        )
        plan.remedies = [remedy for remedy in found if _is_built(remedy)][:MAX_REMEDIES]
    return plan


def build_blank_model(cfg: DictDefault, config: PretrainedConfig) -> tuple[PreTrainedModel, nn.Module]:
    """The model without weights (meta device), plain and as it will be trained.

    Returns:
        (plain model, model with its adapter or with its frozen parameters marked)
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    loader, model_class = read_model_class(cfg, config)
    with torch.device("meta"):
        build = getattr(loader, "from_config", None)
        kwargs = {"trust_remote_code": bool(cfg.trust_remote_code)}
        model: Any = build(config, **kwargs) if build else (model_class or transformers.AutoModelForCausalLM)(config)
    if cfg.adapter in LORA_ADAPTERS:
        # peft changes the model in place; the plain one is built a second time, which costs nothing here
        with torch.device("meta"):
            twin = build(config, **kwargs) if build else type(model)(config)
        lora_config = build_lora_config(twin, cfg)
        lora_config.init_lora_weights = True
        return model, get_peft_model(twin, lora_config, low_cpu_mem_usage=True)
    if cfg.unfrozen_parameters:
        from axolotl.utils.freeze import freeze_layers_except

        freeze_layers_except(model, cfg.unfrozen_parameters)
    return model, model


def plan_data(cfg: DictDefault, notes: list[str]) -> DataPlan:
    """Prepare the data, as the run will find it in its cache, and count it."""
    if is_streamed(cfg):
        notes.append("rows are streamed: their number is known only from `max_steps`")
        return DataPlan(total_num_steps=cfg.max_steps)
    meta = load_datasets(cfg=cfg)
    data = DataPlan(total_num_steps=meta.total_num_steps)
    data.num_rows = len(meta.train_dataset)
    data.num_eval_rows = len(meta.eval_dataset) if meta.eval_dataset is not None else 0
    if "input_ids" not in meta.train_dataset.column_names:
        return data
    lengths = get_dataset_lengths(meta.train_dataset)
    data.num_tokens, data.longest = int(lengths.sum()), int(lengths.max(initial=0))
    if "labels" in meta.train_dataset.column_names:
        data.num_trained_tokens = int(count_trained_tokens(meta.train_dataset).sum())
    if cfg.sample_packing:
        summary = packing_summary(cfg, meta.train_dataset)
        data.num_bins, data.packing_efficiency = summary["bins"], summary["efficiency"]
    if data.num_tokens and data.total_num_steps and cfg.num_epochs and not cfg.max_steps:
        per_rank = data.num_tokens * float(cfg.num_epochs) / data_parallel_size(cfg)
        data.tokens_per_step = round(per_rank / data.total_num_steps)
    return data


def plan_rates(cfg: DictDefault, total_num_steps: int | None) -> list[float]:
    """The learning rate of each step. Empty when the number of steps is unknown, or the rate follows evaluations."""
    steps = int(cfg.max_steps or total_num_steps or 0)
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


def read_run(cfg: DictDefault, model: PreTrainedModel, adapted: nn.Module, data: DataPlan) -> Run:
    """The numbers of a config that its memory depends on."""
    config = model.config.get_text_config()
    is_adapter = adapted is not model
    dtype = read_dtype(cfg)
    compute = 2 if (cfg.bf16 or cfg.fp16 or dtype in (torch.bfloat16, torch.float16)) else 4
    trained_bytes = 4 if is_adapter and cfg.peft_autocast_adapter_dtype is not False else dtype.itemsize
    kernels = is_adapter and any(_has_effect(cfg, f"lora_{part}_kernel") for part in ("mlp", "qkv", "o"))
    own_copies = is_adapter and not kernels and (trained_bytes != compute or bool(cfg.lora_dropout))
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = getattr(config, "num_experts_per_tok", None) or 1
    intermediate = (getattr(config, "moe_intermediate_size", None) if experts > 1 else None) or getattr(
        config, "intermediate_size", 4 * config.hidden_size
    )
    layers = decoder_layers(adapted)
    fused_norm = bool(cfg.liger_rms_norm or cfg.torch_compile)
    glu = (
        "mlp"
        if is_adapter and _has_effect(cfg, "lora_mlp_kernel")
        else "glu"
        if cfg.liger_glu_activation or cfg.torch_compile
        else "no"
    )
    layer = LayerShape(
        hidden=config.hidden_size,
        intermediate=intermediate or 4 * config.hidden_size,
        attention=heads * head_size,
        key_value=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
        active_experts=experts,
        gated=any("gate" in name for name, _ in layers[0].named_parameters()) if layers else True,
        num_norms=_count_norms(layers[0], config.hidden_size) if layers else 2,
        linear_inputs=linear_input_features(
            layers[0], own_copies=own_copies, recompute_mlp=glu == "mlp" or bool(cfg.tiled_mlp)
        )
        if layers
        else 0,
    )
    row_length = int(cfg.sequence_len or config.max_position_embeddings)
    if data.longest and not cfg.sample_packing and not cfg.pad_to_sequence_len:
        row_length = min(row_length, data.longest)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    bits = 4 if cfg.load_in_4bit else 8 if cfg.load_in_8bit else 16
    weights, gradients, optimizer = _shards(cfg)
    head = adapted.get_output_embeddings()
    bnb = cfg.bnb_config_kwargs or DictDefault()
    return Run(
        layer=layer,
        num_layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        tokens=int(cfg.micro_batch_size or 1) * row_length,
        row_length=row_length,
        num_params=sum(p.numel() for p in adapted.parameters()),
        num_trained=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        num_quantized=sum(m.weight.numel() for m in linears),
        largest_linear=max((m.weight.numel() for m in linears), default=0),
        embedding_params=model.get_input_embeddings().weight.numel(),
        is_adapter=is_adapter,
        compute_bytes=compute,
        weight_bytes=dtype.itemsize,
        trained_bytes=trained_bytes,
        weight_bits=bits,
        double_quant=bnb.bnb_4bit_use_double_quant is not False,
        optimizer=str(cfg.optimizer or "adamw_torch_fused"),
        **_read_memory_knobs(cfg, row_length, config.hidden_size),
        attention_kind="eager" if cfg.attn_implementation == "eager" else "flash",
        num_heads=heads,
        fused_norm=fused_norm,
        fused_glu=glu,
        fused_loss=not cfg.rl and not cfg.reward_model,
        head_trained=any(p.requires_grad for p in head.parameters()) if head is not None else False,
        num_sequences_factor=2 if cfg.rl in PAIRED_LOSSES else 1,
        reference_copy=cfg.rl in REFERENCE_LOSSES and not is_adapter,
        shard_weights=weights,
        shard_gradients=gradients,
        shard_optimizer=optimizer,
    )


def _read_memory_knobs(cfg: DictDefault, row_length: int, hidden_size: int) -> dict[str, Any]:
    """Checkpointing, offloading and tiling, as arguments of `Run`."""
    kwargs = cfg.gradient_checkpointing_kwargs or DictDefault()
    selective = cfg.selective_checkpointing
    saved = ["attention"] if selective is True else list((selective or DictDefault()).save or ())
    tiles = cfg.tiled_mlp_num_shards or num_shards_for(row_length, hidden_size)
    chunks = cfg.chunked_cross_entropy_num_chunks or DEFAULT_LOSS_CHUNKS
    return {
        "checkpointing": bool(cfg.gradient_checkpointing),
        "offload": bool(cfg.activation_offloading) or cfg.gradient_checkpointing in ("offload", "offload_disk"),
        "checkpoint_every": int(kwargs.every_n_layers or 1),
        "keeps_attention": "attention" in saved,
        "keeps_on_host": isinstance(selective, dict) and bool(selective.offload),
        "mlp_tiles": int(tiles) if cfg.tiled_mlp else 1,
        "loss_chunks": int(chunks) if cfg.chunked_cross_entropy else 1,
        "layers_on_host": bool(cfg.layer_offloading),
    }


def _has_effect(cfg: DictDefault, key: str) -> bool:
    return bool(cfg[key]) and key not in NO_EFFECT_YET


def _is_built(remedy: Remedy) -> bool:
    """Whether the keys that a remedy names are accepted."""
    keys = [part.partition(":")[0] for part in remedy.change.split(", ") if ": " in part]
    return not not_built_problems(dict.fromkeys(keys, True))


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers: the longest list of equal modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    lists = [module for module in lists if len({type(item) for item in module}) == 1]
    return list(max(lists, key=len)) if lists else []


def linear_input_features(layer: nn.Module, *, own_copies: bool, recompute_mlp: bool = False) -> int:
    """Features per token of the inputs that the linear layers of one decoder layer keep.

    Linear layers of one block that read the same input keep it once, unless each casts or drops it by itself. The output
    of the attention kernel is kept by the kernel already.

    Args:
        own_copies: an adapter in another dtype, or with dropout, keeps a copy of its own.
        recompute_mlp: the fused LoRA MLP recomputes the input of the down projection.
    """
    seen: dict[tuple[str, int], int] = {}
    total = 0
    for name, module in layer.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            trained, features = True, int(module.get_base_layer().in_features)
            total += sum(module.r.values())  # the output of A, the input of B
        elif isinstance(module, nn.Linear) and not name.rpartition(".")[2].startswith(("base_layer", "default")):
            trained, features = module.weight.requires_grad, module.in_features
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        is_output = leaf in ("o_proj", "out_proj", "dense", "wo", "c_proj") and "mlp" not in parent
        if not trained or (recompute_mlp and leaf in ("down_proj", "w2")):
            continue
        if own_copies:
            total += features
        elif not is_output:
            seen[(parent, features)] = features
    return total + sum(seen.values())


def _count_norms(layer: nn.Module, hidden: int) -> int:
    return sum(
        1 for module in layer.modules() if "norm" in type(module).__name__.lower() and
        any(p.shape == (hidden,) for p in module.parameters(recurse=False))
    )  # fmt: skip


def _shards(cfg: DictDefault) -> tuple[int, int, int]:
    """Over how many GPUs weights, gradients and optimizer states are split."""
    world = int(cfg.world_size or 1)
    if cfg.fsdp_config or cfg.fsdp or (cfg.dp_shard_size or 1) > 1:
        size = int(cfg.dp_shard_size or world)
        return size, size, size
    stage = 0
    if isinstance(cfg.deepspeed, dict):
        stage = int((cfg.deepspeed.get("zero_optimization") or {}).get("stage") or 0)
    elif cfg.deepspeed:
        stage = next((number for number in (3, 2, 1) if f"zero{number}" in str(cfg.deepspeed)), 0)
    return world if stage == 3 else 1, world if stage >= 2 else 1, world if stage >= 1 else 1


def _memory_of(gpu: str | None) -> float | None:
    if gpu is None:
        return None
    name = (
        gpu.lower()
        .replace("_", "-")
        .replace(" ", "-")
        .removeprefix("nvidia-")
        .replace("rtx-", "rtx")
        .removeprefix("geforce-")
    )
    name = {"rtxpro-6000": "rtx-pro-6000"}.get(name, name)
    if name not in GPUS:
        raise ConfigError(f"`--gpu {gpu}` is not known. Write one of {', '.join(sorted(GPUS))}, or `--memory 24GiB`.")
    return GPUS[name]


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
    if data.total_num_steps:
        per_step = f", about {data.tokens_per_step:,} tokens each on a GPU" if data.tokens_per_step else ""
        console.print(f"steps       {data.total_num_steps:,}{per_step}")
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
        console.print("  nothing that a key can change: use a larger GPU, or split the model with `fsdp_config`")
