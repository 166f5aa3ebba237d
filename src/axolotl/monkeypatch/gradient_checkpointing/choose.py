"""Whether the inputs of checkpointed layers wait in host memory when the config does not say.

A layer computes about 24 H^2 floating-point operations per token in forward and its input has 2 H bytes, so that a copy needs
1 / (12 H) of the arithmetic's rate: at H = 4096 and 600 TFLOP/s 12 GB/s, of the 50 that an H200's host gives. Measured there for
8B models at 8,192 tokens: 0.3 % of the speed for a tenth of a LoRA run's memory and a fifth of a QLoRA run's.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from axolotl.monkeypatch.compile_layers import runs_compiled
from axolotl.utils.dict import DictDefault

MIN_HIDDEN_SIZE = 3072
HOST_SHARE = 1 / 8
"""Of the free host memory."""


def why_not_offloaded_by_default(
    cfg: DictDefault, config: PretrainedConfig, *, has_gpu: bool, num_processes: int, free_host_bytes: float
) -> str | None:
    """Why a config that does not say `activation_offloading` keeps the inputs of its checkpointed layers on the GPU, or None.

    Args:
        cfg: the config of the run.
        config: the model's.
        has_gpu: whether it will run on CUDA.
        num_processes: of the run.
        free_host_bytes: host memory that a process can still take.
    """
    compiled = runs_compiled(cfg, config, has_gpu=has_gpu)
    config = config.get_text_config()
    tokens = int(cfg.micro_batch_size or 1) * int(cfg.sequence_len or 0)
    needed = 2 * tokens * config.hidden_size * config.num_hidden_layers
    kwargs = cfg.gradient_checkpointing_kwargs or DictDefault()
    rules = (
        (not has_gpu, "no GPU"),
        (num_processes > 1, "not measured where GPUs share the way to the host"),
        (bool(kwargs.use_reentrant) or bool(cfg.selective_checkpointing), "another kind of checkpointing"),
        (not compiled, "the layers are not compiled"),
        # CUDA graphs write to the same memory in every step, with no regard to copies out of it.
        (bool(cfg.torch_compile_mode or cfg.torch_compile_options), "layers compiled in a way of their own"),
        (config.hidden_size < MIN_HIDDEN_SIZE, "a copy would take as long as a layer"),
        (
            not tokens or needed > HOST_SHARE * free_host_bytes,
            f"{needed / 2**30:.1f} GiB of host memory are too much",
        ),
    )
    return next((reason for holds, reason in rules if holds), None)
