"""What the memory of a run depends on: from a config and the model's shapes to a `Run` of `axolotl.utils.forecast`.

In: a resolved `cfg`. The model is built without weights from its config; no GPU is needed and no weights are downloaded.
Defaults that are chosen while the model is loaded, such as compiled layers, are those of the machine that `cfg.capabilities`
describes, which need not be this one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
import transformers
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from axolotl.core.builders.arguments import read_loss_args
from axolotl.core.trainers.causal_loss import chunk_limit
from axolotl.kernels.cross_entropy import rows_at_once
from axolotl.kernels.lora_glu import MAX_SUMMED_RANK, SUMMED_ROWS
from axolotl.loaders.adapter_config import build_lora_config
from axolotl.loaders.model import read_dtype, read_model_class
from axolotl.loaders.utils import LORA_ADAPTERS
from axolotl.model_support import read_model_support
from axolotl.monkeypatch.compile_layers import runs_compiled
from axolotl.monkeypatch.gradient_checkpointing.choose import why_not_offloaded_by_default
from axolotl.monkeypatch.layer_graphs import records_layers
from axolotl.monkeypatch.tiled_mlp import num_shards_for
from axolotl.utils.dict import DictDefault
from axolotl.utils.forecast import LayerShape, Run
from axolotl.utils.freeze import freeze_layers_except
from axolotl.utils.optimizers.states import read_state_options, trained_weights
from axolotl.utils.optimizers.table import read_any_name

PAIRED_LOSSES = ("dpo", "ipo", "orpo", "simpo", "kto")
REFERENCE_LOSSES = ("dpo", "ipo", "kto")
KERNEL_PROJECTIONS = {
    "lora_mlp_kernel": {"gate_proj", "up_proj", "down_proj"},
    "lora_qkv_kernel": {"q_proj", "k_proj", "v_proj"},
    "lora_o_kernel": {"o_proj"},
}


def has_gpu(cfg: DictDefault) -> bool:
    """Whether the machine that the config is resolved for has an NVIDIA or AMD GPU."""
    return bool((cfg.capabilities or DictDefault()).compute_capability)


def compiles_layers(cfg: DictDefault, config: PretrainedConfig) -> bool:
    """Whether the run will compile its layers: as written, or by default on the GPU that the config is resolved for."""
    return runs_compiled(cfg, config, has_gpu=has_gpu(cfg))


def recorded_shapes(cfg: DictDefault, adapted: nn.Module) -> int:
    """Shapes of a batch that the run will record: none without CUDA graphs; packed rows have two or three."""
    num_processes = int((cfg.capabilities or DictDefault()).n_gpu or 1)
    if not records_layers(cfg, adapted, has_gpu=has_gpu(cfg), num_processes=num_processes):
        return 0
    return 3 if cfg.sample_packing else 1


def offloads_by_default(cfg: DictDefault, config: PretrainedConfig) -> bool:
    """Whether checkpointing brings `activation_offloading` along. The host of the run is taken to have the memory."""
    if cfg.activation_offloading is not None:
        return False
    num_processes = int((cfg.capabilities or DictDefault()).n_gpu or 1)
    machine = {"has_gpu": has_gpu(cfg), "num_processes": num_processes, "free_host_bytes": math.inf}
    return why_not_offloaded_by_default(cfg, config, **machine) is None


def lora_kernels_that_fit(cfg: DictDefault, config: PretrainedConfig, layer: nn.Module) -> frozenset[str]:
    """The keys of the LoRA kernels that are on and find the projections they know in a layer of the model."""
    if read_model_support(config.model_type).lora_kernels_refused:
        return frozenset()
    names = {name.rpartition(".")[2] for name, _ in layer.named_modules()}
    return frozenset(key for key, projections in KERNEL_PROJECTIONS.items() if cfg[key] and projections <= names)


def loss_rows(cfg: DictDefault, tokens: int, vocab: int, compute_bytes: int, trained_width: int | None = None) -> int:
    """Rows that go through head and loss at once on a GPU; `trained_width` is the hidden size where the head is trained."""
    limit = chunk_limit(tokens, vocab, read_loss_args(cfg).get("loss_num_chunks"))
    return rows_at_once(vocab, compute_bytes, limit, on_gpu=True, trained_width=trained_width)


def build_blank_model(cfg: DictDefault, config: PretrainedConfig) -> tuple[PreTrainedModel, nn.Module]:
    """The model without weights (meta device), plain and as it will be trained.

    Returns:
        (plain model, model with its adapter or with its frozen parameters marked)
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    loader, model_class = read_model_class(cfg, config)

    def build() -> Any:
        with torch.device("meta"):
            if hasattr(loader, "from_config"):
                return loader.from_config(config, trust_remote_code=bool(cfg.trust_remote_code))
            return (model_class or transformers.AutoModelForCausalLM)(config)

    model = build()
    if cfg.adapter in LORA_ADAPTERS:
        twin = build()  # peft changes the model in place; another one costs nothing here
        lora_config = build_lora_config(twin, cfg)
        lora_config.init_lora_weights = True
        return model, get_peft_model(twin, lora_config, low_cpu_mem_usage=True)
    if cfg.unfrozen_parameters:
        freeze_layers_except(model, cfg.unfrozen_parameters)
    return model, model


def read_run(cfg: DictDefault, model: PreTrainedModel, adapted: nn.Module, longest: int | None = None) -> Run:
    """The numbers of a config that its memory depends on.

    Args:
        cfg: the resolved config.
        model: without weights and adapter.
        adapted: as it will be trained.
        longest: tokens of the longest row, where that is known.
    """
    config = model.config.get_text_config()
    is_adapter = adapted is not model
    layer = next(iter(decoder_layers(adapted)), None)
    kernels = lora_kernels_that_fit(cfg, model.config, layer) if is_adapter and layer is not None else frozenset()
    glu = "mlp" if "lora_mlp_kernel" in kernels else "glu" if cfg.liger_glu_activation else "no"
    compiled = compiles_layers(cfg, model.config)
    formats = _read_number_formats(cfg, is_adapter)
    weights = _count_weights(model, adapted)
    shape = _read_widths(config)
    if layer is not None:
        copies = formats["trained_bytes"] != formats["compute_bytes"] or bool(cfg.lora_dropout)
        shape = dataclasses.replace(
            shape,
            **_measure_layer(
                layer,
                shape,
                is_adapter=is_adapter,
                compiled=compiled,
                kernels=bool(kernels),
                own_copies=is_adapter and not kernels and copies,
                recompute_mlp=glu == "mlp" or bool(cfg.tiled_mlp),
                sums_mlp=compiled and glu == "mlp" and formats["compute_bytes"] == 2,
            ),
        )
    row_length = int(cfg.sequence_len or config.max_position_embeddings)
    if longest and not cfg.sample_packing and not cfg.pad_to_sequence_len:
        row_length = min(row_length, longest)
    tokens = int(cfg.micro_batch_size or 1) * row_length
    return Run(
        layer=shape,
        num_layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        tokens=tokens,
        row_length=row_length,
        is_adapter=is_adapter,
        optimizer=read_any_name(cfg),
        optimizer_options=read_state_options(cfg),
        trained=trained_weights(cfg, adapted, item=formats["trained_bytes"]),
        attention_kind="eager" if cfg.attn_implementation == "eager" else "flash",
        num_heads=config.num_attention_heads,
        compiled=compiled,
        recorded_shapes=recorded_shapes(cfg, adapted),
        lora_kernels=bool(kernels),
        fused_norm=bool(cfg.liger_rms_norm),
        fused_glu=glu,
        loss_rows=loss_rows(
            cfg,
            tokens,
            config.vocab_size,
            formats["compute_bytes"],
            config.hidden_size if weights["head_trained"] else None,
        ),
        fused_loss=not cfg.rl and not cfg.reward_model,
        num_sequences_factor=2 if cfg.rl in PAIRED_LOSSES else 1,
        reference_copy=cfg.rl in REFERENCE_LOSSES and not is_adapter,
        **formats,
        **weights,
        **_read_memory_knobs(cfg, model.config, row_length),
        **_read_shards(cfg),
    )


def _read_number_formats(cfg: DictDefault, is_adapter: bool) -> dict[str, Any]:
    """Bytes of numbers, as arguments of `Run`."""
    dtype = read_dtype(cfg)
    is_half = cfg.bf16 or cfg.fp16 or dtype in (torch.bfloat16, torch.float16)
    return {
        "compute_bytes": 2 if is_half else 4,
        "weight_bytes": dtype.itemsize,
        "trained_bytes": 4 if is_adapter and cfg.peft_autocast_adapter_dtype is not False else dtype.itemsize,
        "weight_bits": 4 if cfg.load_in_4bit else 8 if cfg.load_in_8bit else 16,
        "double_quant": (cfg.bnb_config_kwargs or DictDefault()).bnb_4bit_use_double_quant is not False,
    }


def _count_weights(model: PreTrainedModel, adapted: nn.Module) -> dict[str, Any]:
    """Elements of weights, as arguments of `Run`."""
    output = model.get_output_embeddings()
    linears = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not output]
    head: nn.Module | None = adapted.get_output_embeddings()  # type: ignore[operator] - peft hands it on to the model
    return {
        "num_params": sum(p.numel() for p in adapted.parameters()),
        "num_trained": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "num_quantized": sum(linears),
        "largest_linear": max(linears, default=0),
        "embedding_params": model.get_input_embeddings().weight.numel(),
        "head_trained": head is not None and any(p.requires_grad for p in head.parameters()),
    }


def _read_widths(config: Any) -> LayerShape:
    """A decoder layer as its config describes it."""
    sizes = config.to_dict()
    heads = config.num_attention_heads
    head_size = sizes.get("head_dim") or config.hidden_size // heads
    experts = sizes.get("num_experts_per_tok") or 1
    of_expert = sizes.get("moe_intermediate_size") if experts > 1 else None
    return LayerShape(
        hidden=config.hidden_size,
        intermediate=of_expert or sizes.get("intermediate_size") or 4 * config.hidden_size,
        attention=heads * head_size,
        key_value=(sizes.get("num_key_value_heads") or heads) * head_size,
        active_experts=experts,
    )


def _measure_layer(
    layer: nn.Module,
    shape: LayerShape,
    *,
    is_adapter: bool,
    compiled: bool,
    kernels: bool,
    own_copies: bool,
    recompute_mlp: bool,
    sums_mlp: bool,
) -> dict[str, Any]:
    """What only the modules of a layer tell, as arguments of `LayerShape`."""
    of_modules = {name: sum(m.r.values()) for name, m in layer.named_modules() if isinstance(m, LoraLayer)}
    ranks = sum(of_modules.values())
    of_mlp = [r for name, r in of_modules.items() if name.rpartition(".")[2] in KERNEL_PROJECTIONS["lora_mlp_kernel"]]
    sums = shape.intermediate * sum(of_mlp) / SUMMED_ROWS if sums_mlp and max(of_mlp) <= MAX_SUMMED_RANK else 0.0
    if not compiled:
        inputs = linear_input_features(layer, own_copies=own_copies, recompute_mlp=recompute_mlp)
    elif is_adapter and not kernels:
        # Only peft's own adapters keep their inputs there, the output of attention in a copy of its own.
        inputs = linear_input_features(layer, own_copies=False) - ranks + shape.attention
    else:
        inputs = 0
    return {
        "gated": any("gate" in name for name, _ in layer.named_parameters()),
        "num_norms": count_norms(layer, shape.hidden),
        "linear_inputs": inputs,
        "ranks": ranks,
        "sums": sums,
    }


def _read_memory_knobs(cfg: DictDefault, config: PretrainedConfig, row_length: int) -> dict[str, Any]:
    """Checkpointing, offloading and tiling, as arguments of `Run`."""
    kwargs = cfg.gradient_checkpointing_kwargs or DictDefault()
    selective = cfg.selective_checkpointing
    saved = ["attention"] if selective is True else list((selective or DictDefault()).save or ())
    by_default = offloads_by_default(cfg, config)
    tiles = cfg.tiled_mlp_num_shards or num_shards_for(row_length, config.get_text_config().hidden_size)
    return {
        "checkpointing": bool(cfg.gradient_checkpointing),
        "offload": bool(cfg.activation_offloading) or bool(cfg.gradient_checkpointing and by_default),
        "offloads_by_default": by_default,
        "checkpoint_every": int(kwargs.every_n_layers or 1),
        "keeps_attention": "attention" in saved,
        "keeps_on_host": isinstance(selective, dict) and bool(selective.offload),
        "mlp_tiles": int(tiles) if cfg.tiled_mlp else 1,
        "layers_on_host": bool(cfg.layer_offloading),
    }


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


def count_norms(layer: nn.Module, hidden: int) -> int:
    """Normalisations of a layer whose weight is as wide as the hidden states."""
    norms = [module for module in layer.modules() if "norm" in type(module).__name__.lower()]
    return sum(any(p.shape == (hidden,) for p in norm.parameters(recurse=False)) for norm in norms)


def _read_shards(cfg: DictDefault) -> dict[str, Any]:
    """Over how many GPUs weights, gradients and optimizer states are split, as arguments of `Run`."""
    world = int(cfg.world_size or 1)
    stage = 0  # of ZeRO: 1 splits the states, 2 the gradients too, 3 the weights too
    if cfg.fsdp_config or cfg.fsdp or (cfg.dp_shard_size or 1) > 1:
        world, stage = int(cfg.dp_shard_size or world), 3
    elif isinstance(cfg.deepspeed, dict):
        stage = int((cfg.deepspeed.get("zero_optimization") or {}).get("stage") or 0)
    elif cfg.deepspeed:
        stage = next((number for number in (3, 2, 1) if f"zero{number}" in str(cfg.deepspeed)), 0)
    parts = {"shard_optimizer": 1, "shard_gradients": 2, "shard_weights": 3}
    return {part: world if stage >= needed else 1 for part, needed in parts.items()}
