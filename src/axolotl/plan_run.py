"""What the memory of a run depends on: from a config and the model's shapes to a `Run` of `axolotl.utils.forecast`.

In: a resolved `cfg`. The model is built without weights from its config; no GPU is needed and no weights are downloaded.
Defaults that are chosen while the model is loaded, such as compiled layers, are those of the machine that `cfg.capabilities`
describes, which need not be this one.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import transformers
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from axolotl.core.builders.causal import DEFAULT_LOSS_CHUNKS
from axolotl.kernels.cross_entropy import CHUNK_ELEMENTS
from axolotl.loaders.adapter import LORA_ADAPTERS, build_lora_config
from axolotl.loaders.model import read_dtype, read_model_class
from axolotl.model_support import read_model_support
from axolotl.monkeypatch.compile_layers import runs_compiled
from axolotl.monkeypatch.gradient_checkpointing.choose import why_not_offloaded_by_default
from axolotl.monkeypatch.tiled_mlp import num_shards_for
from axolotl.utils.dict import DictDefault
from axolotl.utils.forecast import LayerShape, Run

PAIRED_LOSSES = ("dpo", "ipo", "orpo", "simpo", "kto")
REFERENCE_LOSSES = ("dpo", "ipo", "kto")
LOSS_ROW_MULTIPLE = 128  # rows of a chunk of the loss on a GPU (axolotl.kernels.cross_entropy)
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


def loss_rows(cfg: DictDefault, tokens: int, vocab: int, compute_bytes: int) -> int:
    """Rows that go through head and loss at once, as `axolotl.kernels.cross_entropy.linear_cross_entropy` chooses them."""
    limit = CHUNK_ELEMENTS
    if cfg.chunked_cross_entropy:
        limit = min(limit, -(-tokens // int(cfg.chunked_cross_entropy_num_chunks or DEFAULT_LOSS_CHUNKS)) * vocab)
    rows = max(1, limit // vocab) * (2 if compute_bytes == 2 else 1)
    return max(LOSS_ROW_MULTIPLE, rows // LOSS_ROW_MULTIPLE * LOSS_ROW_MULTIPLE)


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
    dtype = read_dtype(cfg)
    compute = 2 if (cfg.bf16 or cfg.fp16 or dtype in (torch.bfloat16, torch.float16)) else 4
    trained_bytes = 4 if is_adapter and cfg.peft_autocast_adapter_dtype is not False else dtype.itemsize
    layers = decoder_layers(adapted)
    fused = lora_kernels_that_fit(cfg, model.config, layers[0]) if is_adapter and layers else frozenset()
    kernels = bool(fused)
    own_copies = is_adapter and not kernels and (trained_bytes != compute or bool(cfg.lora_dropout))
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = getattr(config, "num_experts_per_tok", None) or 1
    intermediate = (getattr(config, "moe_intermediate_size", None) if experts > 1 else None) or getattr(
        config, "intermediate_size", 4 * config.hidden_size
    )
    compiled = compiles_layers(cfg, model.config)
    glu = "mlp" if "lora_mlp_kernel" in fused else "glu" if cfg.liger_glu_activation else "no"
    ranks = sum(sum(m.r.values()) for m in layers[0].modules() if isinstance(m, LoraLayer)) if layers else 0
    if compiled:
        # Only peft's own adapters keep their inputs there, the output of attention in a copy of its own.
        plain = layers and is_adapter and not kernels
        inputs = linear_input_features(layers[0], own_copies=False) - ranks + heads * head_size if plain else 0
    else:
        recompute_mlp = glu == "mlp" or bool(cfg.tiled_mlp)
        inputs = linear_input_features(layers[0], own_copies=own_copies, recompute_mlp=recompute_mlp) if layers else 0
    layer = LayerShape(
        hidden=config.hidden_size,
        intermediate=intermediate or 4 * config.hidden_size,
        attention=heads * head_size,
        key_value=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
        active_experts=experts,
        gated=any("gate" in name for name, _ in layers[0].named_parameters()) if layers else True,
        num_norms=_count_norms(layers[0], config.hidden_size) if layers else 2,
        linear_inputs=inputs,
        ranks=ranks,
    )
    row_length = int(cfg.sequence_len or config.max_position_embeddings)
    if longest and not cfg.sample_packing and not cfg.pad_to_sequence_len:
        row_length = min(row_length, longest)
    tokens = int(cfg.micro_batch_size or 1) * row_length
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    bits = 4 if cfg.load_in_4bit else 8 if cfg.load_in_8bit else 16
    weights, gradients, optimizer = _shards(cfg)
    head = adapted.get_output_embeddings()
    bnb = cfg.bnb_config_kwargs or DictDefault()
    return Run(
        layer=layer,
        num_layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        tokens=tokens,
        row_length=row_length,
        num_params=sum(p.numel() for p in adapted.parameters()),
        num_trained=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        num_quantized=sum(m.weight.numel() for m in linears),
        largest_linear=max((m.weight.numel() for m in linears), default=0),
        embedding_params=model.get_input_embeddings().weight.numel(),
        trained_embeddings=sum(
            m.weight.numel() for m in adapted.modules() if isinstance(m, nn.Embedding) and m.weight.requires_grad
        ),
        is_adapter=is_adapter,
        compute_bytes=compute,
        weight_bytes=dtype.itemsize,
        trained_bytes=trained_bytes,
        weight_bits=bits,
        double_quant=bnb.bnb_4bit_use_double_quant is not False,
        optimizer=str(cfg.optimizer or "adamw_torch_fused"),
        **_read_memory_knobs(cfg, model.config, row_length),
        attention_kind="eager" if cfg.attn_implementation == "eager" else "flash",
        num_heads=heads,
        compiled=compiled,
        lora_kernels=kernels,
        fused_norm=bool(cfg.liger_rms_norm),
        fused_glu=glu,
        loss_rows=loss_rows(cfg, tokens, config.vocab_size, compute),
        fused_loss=not cfg.rl and not cfg.reward_model,
        head_trained=any(p.requires_grad for p in head.parameters()) if head is not None else False,
        num_sequences_factor=2 if cfg.rl in PAIRED_LOSSES else 1,
        reference_copy=cfg.rl in REFERENCE_LOSSES and not is_adapter,
        shard_weights=weights,
        shard_gradients=gradients,
        shard_optimizer=optimizer,
    )


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
