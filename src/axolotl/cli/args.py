"""Module for axolotl CLI command arguments. One dataclass per command; its fields are the command's options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _option(default: Any, help_line: str) -> Any:
    return field(default=default, metadata={"help": help_line})


@dataclass
class PreprocessCliArgs:
    """Dataclass with CLI arguments for `axolotl preprocess` command."""

    debug: bool = _option(False, "Show prepared rows, each token coloured by whether it is trained.")
    debug_text_only: bool = _option(False, "With --debug: show the text without token ids.")
    debug_num_examples: int = _option(1, "With --debug: how many rows to show.")
    prompter: str | None = _option(None, "Prompter class to use.")
    download: bool = _option(True, "Also download the base model, so that training starts without network.")
    iterable: bool = _option(False, "Not supported: use `streaming: true` and `axolotl train`.")


@dataclass
class TrainerCliArgs:
    """Dataclass with CLI arguments for `axolotl train` command."""

    debug: bool = _option(False, "Show prepared rows, each token coloured by whether it is trained.")
    debug_text_only: bool = _option(False, "With --debug: show the text without token ids.")
    debug_num_examples: int = _option(0, "With --debug: how many rows to show.")
    prompter: str | None = _option(None, "Prompter class to use.")
    shard: bool = _option(False, "Kept for old scripts; sharding is set by `fsdp_config` or `deepspeed`.")


@dataclass
class EvaluateCliArgs:
    """Dataclass with CLI arguments for `axolotl evaluate` command."""

    debug: bool = _option(False, "Show prepared rows, each token coloured by whether it is trained.")
    debug_text_only: bool = _option(False, "With --debug: show the text without token ids.")
    debug_num_examples: int = _option(0, "With --debug: how many rows to show.")


@dataclass
class InferenceCliArgs:
    """Dataclass with CLI arguments for `axolotl inference` command."""

    prompter: str | None = _option(None, "Prompter class to use.")


@dataclass
class QuantizeCliArgs:
    """Dataclass with CLI arguments for `axolotl quantize` command."""

    base_model: str | None = _option(None, "Model to quantize, in place of the config's.")
    weight_dtype: str | None = _option(None, "Type of the weights, such as int4, int8, float8.")
    activation_dtype: str | None = _option(None, "Type of the activations, such as int8, float8.")
    quantize_embedding: bool | None = _option(None, "Quantize the embeddings too.")
    group_size: int | None = _option(None, "Weights that share one scale.")
    output_dir: str | None = _option(None, "Folder for the quantized model.")
    hub_model_id: str | None = _option(None, "Repository of the Hugging Face hub to push it to.")


@dataclass
class VllmServeCliArgs:
    """Dataclass with CLI arguments for `axolotl vllm-serve` command."""

    tensor_parallel_size: int | None = _option(None, "Tensor parallel workers.")
    data_parallel_size: int | None = _option(None, "Data parallel workers.")
    host: str | None = _option(None, "Host address to listen on.")
    port: int | None = _option(None, "Port to listen on.")
    gpu_memory_utilization: float | None = _option(
        None, "Share of the GPU memory for weights, activations and KV cache."
    )
    dtype: str | None = _option(None, "Data type of the generation.")
    max_model_len: int | None = _option(None, "Longest sequence, prompt and completion.")
    enable_prefix_caching: bool | None = _option(None, "Reuse the KV cache of common prefixes.")
    serve_module: str | None = _option(None, "Module that is run as the server.")
    enable_reasoning: bool | None = _option(None, "Parse the reasoning of reasoning models.")
    reasoning_parser: str | None = _option(None, "Parser of the reasoning.")
