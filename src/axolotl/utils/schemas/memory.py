"""Number formats, and what is kept where."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from axolotl.utils.schemas.fields import IGNORE_CASE, Int, Words, key
from axolotl.utils.schemas.quantization import PTQConfig, QATConfig


class SelectiveCheckpointingConfig(Words):
    """Keep some results for the backward pass and recompute the others."""

    save: list[str] = key(
        "What to keep: `attention`, `mm`, `addmm`, `bmm`, `linear`, `matmul`, `all_matmuls`, or operators such as `aten.silu`.",
        ["attention"],
    )
    save_sliding_window: bool = key("Keep sliding-window attention too.", False)
    recompute_layer_types: list[str] | None = key("Layer types to recompute in full.")
    offload: bool = key("Keep it in host memory.", False)


class FP8Config(Words):
    """How float8 training scales."""

    recipe: Annotated[Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"], IGNORE_CASE] = key(
        "What shares one scale: a tensor, or a row; `rowwise_with_gw_hp` makes the gradients of weights in bf16.",
        "tensorwise",
    )
    filter_fqns: list[str] | None = key(
        "Parts of the names of linear layers that stay in bf16, such as `down_proj` or `layers.0.`."
    )


class PrecisionConfig(Words):
    """Number formats and memory."""

    bf16: Annotated[Literal["auto", "full"] | bool | None, IGNORE_CASE] = key(
        "Train in bfloat16: true, false, `auto` (if the machine can) or `full` (evaluate in it too).", "auto"
    )
    fp16: Annotated[bool | None, IGNORE_CASE] = key("Train in float16.")
    fp8: bool | None = key(
        "Multiply matrices in float8: of all weights while they train, or of the frozen base of `adapter: lora`."
    )
    fp8_enable_fsdp_float8_all_gather: bool | None = key("Send weights between GPUs in float8.")
    fp8_config: FP8Config | None = key("How float8 training scales.")
    bfloat16: bool | None = key("Keep weights in bfloat16, without mixed precision.")
    float16: bool | None = key("Keep weights in float16, without mixed precision.")
    float32: bool | None = key("Keep weights in float32; with `bf16: true`, compute in bfloat16.")
    tf32: Annotated[Literal["auto"] | bool | None, IGNORE_CASE] = key("Multiply float32 matrices in TF32.", "auto")
    fp32_norms: bool | None = key("Keep norms in float32 under FSDP2.")
    fp32_norm_classes: list[str] | None = key("Endings of the class names that are norms. Default: RMSNorm, LayerNorm.")
    gradient_checkpointing: Annotated[Literal["offload", "offload_disk"] | bool | None, IGNORE_CASE] = key(
        "Recompute activations in the backward pass, to save memory.", False
    )
    gradient_checkpointing_kwargs: dict[str, Any] | None = key("Arguments for gradient checkpointing.")
    activation_offloading: Annotated[Literal["legacy", "disk", "hidden_states"] | bool | None, IGNORE_CASE] = key(
        "Move what checkpointing keeps to host memory (true, `hidden_states`, `legacy`) or `disk`. Not written: true on one GPU where "
        "the copies hide behind wide compiled layers."
    )
    selective_checkpointing: SelectiveCheckpointingConfig | bool | None = key(
        "Keep some results for the backward pass and recompute the others."
    )
    layer_offloading: bool | None = key(
        "Keep frozen weights of the layers in host memory until they are needed.", False
    )
    unfrozen_parameters: list[str] | None = key("Regular expressions of the parameters to train; others are frozen.")
    device: Any | None = key("Device to train on. Default: chosen for each process.")
    device_map: Any | None = key("Where parts of the model go, as transformers' `device_map`.")
    max_memory: dict[Int | Literal["cpu", "disk"], Int | str] | None = key(
        "Memory that each device may give to the model."
    )
    gpu_memory_limit: Int | str | None = key("Memory that every GPU may give to the model; a number is in gigabytes.")
    low_cpu_mem_usage: bool | None = key("Load the model without a second copy in host memory, as is always done.")
    torch_compile: Annotated[Literal["auto"] | bool | None, IGNORE_CASE] = key("Compile the model.")
    torch_compile_backend: str | None = key("Backend of the compiler.")
    torch_compile_mode: Annotated[
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None, IGNORE_CASE
    ] = key("Mode of the compiler.")
    torch_compile_options: dict[str, Any] | None = key("Options of the compiler.")
    cuda_graphs: bool | None = key(
        "Record the kernels of each compiled layer and launch them together. Left out: where launching takes longer than running."
    )
    torch_empty_cache_steps: Int | None = key("Empty the GPU cache every so many steps.", ge=1)
    gc_collect_steps: Int | None = key(
        "Collect Python's garbage every so many steps; -1: after each epoch and before evaluation.", ge=-1
    )
    qat: QATConfig | None = key("Train with the rounding of quantization simulated.")
    quantization: PTQConfig | None = key("How `axolotl quantize` quantizes.")
