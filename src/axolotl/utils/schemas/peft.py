"""Adapters: LoRA, QLoRA and their relatives, and loading the base model in 4 or 8 bits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import PositiveInt

from axolotl.utils.schemas.fields import IGNORE_CASE, Float, Int, Text, Words, key


class LoftQConfig(Words):
    """LoftQ initialisation of LoRA."""

    loftq_bits: Int = key("Bits that the base weights are quantized to; typically 4.", 4)


class PeftConfig(Words):
    """Further options for PEFT."""

    loftq_config: LoftQConfig | None = key("Initialise LoRA with LoftQ.")


class PeftAdapterConfig(Words):
    """Size of a LLaMA-Adapter."""

    layers: Int | None = key("Number of upper layers that get the adapter.", ge=1)
    len: Int | None = key("Number of adapter tokens.", ge=1)


class LoraConfig(Words):
    """LoRA and QLoRA."""

    load_in_8bit: bool | None = key("Load the base model in 8 bits.", False)
    load_in_4bit: bool | None = key("Load the base model in 4 bits (bitsandbytes).", False)
    adapter: Annotated[str | None, IGNORE_CASE] = key(
        "`lora`, `qlora`, `llama-adapter`, or empty to train all weights."
    )
    lora_model_dir: Text | None = key("Trained adapter to start from. To use a result, write its `output_dir`.")
    lora_r: Int | None = key("Rank of the LoRA matrices.", ge=1)
    lora_alpha: Int | None = key("LoRA scale: the update is multiplied by `lora_alpha / lora_r`.", gt=0)
    lora_fan_in_fan_out: bool | None = key("The base layers store their weights as (in, out), as in GPT-2.")
    lora_target_modules: str | list[str] | None = key("Names of the layers that get LoRA, or one regular expression.")
    lora_target_parameters: str | list[str] | None = key(
        "Names of parameters (not layers) that get LoRA, such as fused experts."
    )
    lora_exclude_modules: str | list[str] | None = key("Names of layers that get no LoRA, or one regular expression.")
    lora_target_linear: bool | None = key("All linear layers except the output embedding get LoRA.")
    lora_modules_to_save: list[str] | None = key(
        "Layers trained in full beside LoRA; new tokens need `embed_tokens` and `lm_head`."
    )
    lora_dropout: Float | None = key("Dropout in front of the LoRA matrices.", 0.0, ge=0, le=1)
    lora_rank_pattern: dict[str, PositiveInt] | None = key("Rank for layers that match a regular expression.")
    lora_alpha_pattern: dict[str, PositiveInt] | None = key("Alpha for layers that match a regular expression.")
    peft_layers_to_transform: Int | list[Int] | None = key("Indices of the layers that get LoRA. Default: all.")
    peft_layers_pattern: str | list[str] | None = key(
        "Name of the list of layers that `peft_layers_to_transform` counts in."
    )
    peft: PeftConfig | None = key("Further options for PEFT.")
    peft_adapter: PeftAdapterConfig | None = key("Size of the adapter for `adapter: llama-adapter`.")
    peft_use_dora: bool | None = key("Use DoRA: train magnitude and direction apart.")
    peft_use_rslora: bool | None = key("Use rsLoRA: scale by `lora_alpha / sqrt(lora_r)`.")
    peft_layer_replication: list[tuple[Int, Int]] | None = key("Ranges of layers to stack, as `[start, end]` pairs.")
    peft_init_lora_weights: bool | str | None = key(
        "How LoRA starts: true (B is zero), false, `gaussian`, `orthogonal`, `pissa`, `pissa_niter_4`, `olora`, `loftq`, `mica`; or from rows: `eva`, "
        "`corda`, `lora_ga`."
    )
    peft_trainable_token_indices: list[Int] | dict[str, list[Int]] | None = key(
        "Token ids whose embeddings are trained; or, per embedding layer, its token ids."
    )
    peft_ensure_weight_tying: bool | None = key("Keep tied embeddings tied when they are trained beside LoRA.")
    peft_autocast_adapter_dtype: bool | None = key("Let PEFT keep adapter weights in float32.")
    qlora_sharded_model_loading: bool | None = key("Load a QLoRA base model shard by shard for FSDP.", False)
    lora_on_cpu: bool | None = key("Load the adapter on the CPU, when the base model leaves no room on the GPU.")
    gptq: bool | None = key("The base model is quantized with GPTQ.")
    gptq_disable_exllama: bool | None = key("Do not use the ExLlama kernels with a GPTQ model.")
    bnb_config_kwargs: dict[str, Any] | None = key("Values that replace those of the bitsandbytes quantization config.")
    bnb_4bit_quant_type: Annotated[Literal["nf4", "fp4"] | None, IGNORE_CASE] = key(
        "4-bit number format. Default: `nf4`."
    )
    bnb_4bit_compute_dtype: str | None = key(
        "Number format to compute in with 4-bit weights. Default: that of the run."
    )
    bnb_4bit_use_double_quant: bool | None = key("Quantize the quantization constants too. Default: true.")
    bnb_4bit_quant_storage: str | None = key("Number format that holds the packed 4-bit weights.")
    loraplus_lr_ratio: Float | None = key("LoRA+: learning rate of B over that of A. Recommended: 16.", gt=0)
    loraplus_lr_embedding: Float | None = key("LoRA+: learning rate of LoRA on embeddings.", 1e-6)
    merge_lora: bool | None = key("Merge the adapter into the base model (set by `axolotl merge-lora`).")
    merge_method: Annotated[Literal["memory_efficient", "legacy"] | None, IGNORE_CASE] = key(
        "Merge shard by shard (`memory_efficient`) or with the whole model in memory (`legacy`).", "memory_efficient"
    )


class ReLoRAConfig(Words):
    """ReLoRA: merge and restart LoRA several times in one run."""

    relora: bool | None = key("Use ReLoRA; needs `jagged_restart_steps`.")
    relora_prune_ratio: Float | None = key("Share of the optimizer state to drop at a restart.", ge=0, le=1)
    relora_prune_method: Annotated[Literal["magnitude", "random", "reset"] | None, IGNORE_CASE] = key(
        "Which part of the optimizer state to drop at a restart.", "magnitude"
    )
    relora_cpu_offload: bool | None = key("Merge on the CPU at a restart, as is always done.")
