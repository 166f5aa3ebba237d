"""LoRA and QLoRA of a Llama on one GPU: plain peft, with the LoRA kernels, and with decoder layers compiled.

    python benchmarks/llama.py                                  # LoRA 8B, 4096, with and without checkpointing
    python benchmarks/llama.py --adapter qlora
    python benchmarks/llama.py --shape 1b --variants plain kernels
    python benchmarks/llama.py --shape 1b --adapter full --micro-batch-size 4 --accumulation 2

Random weights of the real shapes are made on the GPU, full-length random tokens, micro-batch 2, accumulation 4, rank 16, alpha
32, all linear layers, bf16 autocast over fp32 adapters, fused AdamW. Each variant starts from the same adapter and reads the
same tokens, so that its losses can be compared with those of `plain`. Writes `benchmarks/results/<device>-<adapter>-<shape>.json`.

`row.py` measures what a YAML gives; this loop takes it apart.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    DATASHEET_TFLOPS,
    DEVICE,
    HERE,
    SHAPES,
    device_slug,
    flop_per_token,
    matmul_tflops,
    record_head,
    synchronize,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig

from axolotl.kernels.cross_entropy import linear_cross_entropy
from axolotl.kernels.fp8_linear import RECIPES, Fp8TrainingLinear
from axolotl.monkeypatch.compile_layers import compile_layers, uncompile_layers
from axolotl.monkeypatch.fp8_base import apply_fp8_base
from axolotl.monkeypatch.fp8_linear import apply_fp8_training
from axolotl.monkeypatch.gradient_checkpointing.install import apply_activation_policies, remove_activation_policies
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches, remove_lora_kernel_patches
from axolotl.utils.dict import DictDefault

# In fp8 an adapter's base is frozen; all weights (`--adapter full`) train by one of the recipes, tensorwise if none is named.
FULL_FP8 = {f"compile+fp8{'' if recipe == 'tensorwise' else '-' + recipe}": recipe for recipe in RECIPES}
VARIANTS = {
    "lora": ("plain", "kernels", "compile", "kernels+compile", "kernels+compile+fp8"),
    "qlora": ("plain", "kernels", "compile", "kernels+compile"),
    "full": ("plain", "compile", *FULL_FP8),
}
KERNELS = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}


def quantize_linears(model: nn.Module) -> None:
    """Make every linear layer but the head NF4 with nested statistics, one by one."""
    import bitsandbytes as bnb

    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        quantized = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        quantized.weight = weight.to(DEVICE)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, quantized)
    model.is_loaded_in_4bit = True  # peft looks here


def build_model(shape: str, adapter: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=8192, use_cache=False, **SHAPES[shape])
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    model.config.use_cache = False
    if adapter == "full":
        return model.train()
    model.requires_grad_(False)
    if adapter == "qlora":
        quantize_linears(model)
        gc.collect()
    model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()


def base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    base = base_of(model)
    hidden = base.model(input_ids=ids).last_hidden_state
    total = linear_cross_entropy(hidden[:, :-1], base.lm_head.weight, ids[:, 1:])
    return total / ids[:, 1:].numel()


def profile(model: nn.Module, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """Print where the GPU time of one micro-batch goes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of(model, ids) / args.accumulation
        loss.backward()
        synchronize()
    print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=110))
    for parameter in model.parameters():
        parameter.grad = None


def difference(gradients: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two sets of gradients over the norm of the second; a missing one counts as zero."""
    zero = torch.zeros(())
    far = sum((gradients.get(name, zero) - grad).square().sum() for name, grad in wanted.items())
    return float((far / sum(grad.square().sum() for grad in wanted.values())).sqrt())


def run_variant(
    model: nn.Module, variant: str, checkpointing: bool, args: argparse.Namespace, initial: dict
) -> tuple[dict[str, torch.Tensor], dict]:
    """Train a few steps. Returns the gradients of the first step, then speed, memory and losses."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(initial[name])
                parameter.grad = None
    base = base_of(model)
    if "kernels" in variant:
        cfg = DictDefault(KERNELS)
        apply_lora_kernel_patches(model, cfg)
        assert cfg.resolution is None, cfg.resolution
    if variant in FULL_FP8:
        apply_fp8_training(model, DictDefault(fp8_config={"recipe": FULL_FP8[variant]}))
    elif "fp8" in variant:
        apply_fp8_base(model, DictDefault())  # for good: the last variant
    if checkpointing and args.offload:
        apply_activation_policies(model, offloading=True)
    if "compile" in variant:
        torch._dynamo.reset()
        compile_layers(model)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.learning_rate,
        weight_decay=0.0,
        fused=DEVICE == "cuda",
    )
    generator = torch.Generator().manual_seed(0)
    shape = (args.accumulation, args.micro_batch_size, args.sequence_len)
    seconds, losses = [], []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(args.warmup + args.steps):
        ids = torch.randint(0, base.config.vocab_size, shape, generator=generator).to(DEVICE)
        synchronize()
        start = time.perf_counter()
        total = torch.zeros((), device=DEVICE)
        for micro in ids:
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = loss_of(model, micro) / args.accumulation
            loss.backward()
            total += loss.detach()
        if step == 0:
            gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(total.item())
    if args.profile:
        profile(model, ids[0], args)
    uncompile_layers(model)
    remove_lora_kernel_patches(model)
    for module in model.modules():
        if isinstance(module, Fp8TrainingLinear):
            module.__class__ = nn.Linear
    if checkpointing:
        base.gradient_checkpointing_disable()
        remove_activation_policies(base)
    step = statistics.median(seconds[args.warmup :])
    adapter = isinstance(model, PeftModel)
    flop = flop_per_token(base.config, adapter=adapter, length=args.sequence_len, checkpointing=checkpointing)
    tokens = args.accumulation * args.micro_batch_size * args.sequence_len
    return gradients, {
        "variant": variant,
        "gradient_checkpointing": checkpointing,
        "tokens_per_second": round(tokens / step, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if DEVICE == "cuda" else None,
        "tflops": round(tokens / step * flop / 1e12, 1),
        "first_step_seconds": round(seconds[0], 2),
        "step_seconds": [round(value, 4) for value in seconds],
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--adapter", choices=("lora", "qlora", "full"), default="lora")
    parser.add_argument("--variants", nargs="+", help="default: all of the adapter")
    parser.add_argument("--checkpointing", choices=("off", "on", "both"), default="both")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--sequence-len", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="measured steps; the median counts")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--offload", action="store_true", help="inputs of checkpointed layers wait in host memory")
    parser.add_argument("--profile", action="store_true", help="print the GPU time of one micro-batch by kernel")
    parser.add_argument("--cudnn", action="store_true", help="sdpa prefers cuDNN's attention")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.variants = args.variants or list(VARIANTS[args.adapter])
    if wrong := set(args.variants) - set(VARIANTS[args.adapter]):
        parser.error(
            f"--adapter {args.adapter} has no {', '.join(wrong)}; choose from {', '.join(VARIANTS[args.adapter])}"
        )

    model = build_model(args.shape, args.adapter, args.attention)
    initial = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    matmul = matmul_tflops()
    if args.cudnn:
        order = [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ]
        stack = contextlib.ExitStack()
        stack.enter_context(sdpa_kernel(order, set_priority=True))
    rows: list[dict[str, Any]] = []
    for checkpointing in {"off": (False,), "on": (True,), "both": (False, True)}[args.checkpointing]:
        plain: list[float] | None = None
        wanted: dict[str, torch.Tensor] = {}
        for variant in args.variants:
            gradients, row = run_variant(model, variant, checkpointing, args, initial)
            if not wanted:
                plain, wanted = row["losses"], gradients
            row["gradient_difference"] = round(difference(gradients, wanted), 5)
            row["of_datasheet"] = round(row["tflops"] / DATASHEET_TFLOPS, 3)
            row["of_measured_matmul"] = round(row["tflops"] / matmul, 3)
            row["loss_difference"] = (
                max(abs(a - b) for a, b in zip(row["losses"], plain, strict=True)) if plain else None
            )
            rows.append(row)
            print(
                f"{args.adapter} {args.shape} checkpointing={checkpointing!s:5} {variant:16} "
                f"{row['tokens_per_second']:>9} tok/s  {row['peak_gib']} GiB  {row['tflops']} TFLOP/s "
                f"({row['of_datasheet']:.0%} of {DATASHEET_TFLOPS:.0f}, {row['of_measured_matmul']:.0%} of {matmul:.0f})  "
                f"first step {row['first_step_seconds']} s  loss {row['losses'][0]:.4f} .. {row['losses'][-1]:.4f} "
                f"(differs by {row['loss_difference']:.2e}, gradients by {row['gradient_difference']:.2e})",
                flush=True,
            )
    result = {
        **record_head(),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "matmul_tflops": round(matmul, 1),
        "rows": rows,
    }
    out = args.out or HERE / "results" / f"{device_slug()}-{args.adapter}-{args.shape}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(out)


if __name__ == "__main__":
    main()
