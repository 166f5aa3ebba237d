"""The `vllm` section: how the vLLM server starts."""

from __future__ import annotations

from axolotl.utils.schemas.fields import Float, Int, Words, key


class VllmConfig(Words):
    """How `axolotl vllm-serve` starts the server."""

    device: str | None = key("Device of the server.", "auto")
    tensor_parallel_size: Int | None = key("GPUs that share one copy of the model.", ge=1)
    data_parallel_size: Int | None = key("Copies of the model.", ge=1)
    gpu_memory_utilization: Float | None = key("Share of GPU memory that vLLM may take.", 0.9, gt=0, le=1)
    dtype: str | None = key("Number format of the weights.", "auto")
    max_model_len: Int | None = key("Longest sequence, in tokens.", ge=1)
    enable_prefix_caching: bool | None = key("Reuse computed prefixes.")
    host: str | None = key("Host to listen on.", "0.0.0.0")
    port: Int | None = key("Port to listen on.", 8000)
    enable_reasoning: bool | None = key("Separate reasoning from the answer.")
    reasoning_parser: str | None = key("Parser of the reasoning.")
    enforce_eager: bool | None = key("Do not use CUDA graphs.")
    serve_module: str | None = key("Module that runs the server.")
    worker_extension_cls: str | None = key("Class that extends vLLM's workers, as an importable path.")
