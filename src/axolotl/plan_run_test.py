"""What a config says about the memory of its run, and what is said when it is too much."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from axolotl.cli.plan import planned_machine
from axolotl.kernels.lora_glu import SUMMED_ROWS
from axolotl.plan import describe_shortage
from axolotl.plan_run import (
    build_blank_model,
    compiles_layers,
    decoder_layers,
    lora_kernels_that_fit,
    loss_rows,
    offloads_by_default,
    read_run,
)
from axolotl.utils.dict import DictDefault
from axolotl.utils.forecast import GIB, forecast
from axolotl.utils.gpus import capabilities_of
from tests.tiny import make_tiny_model

KERNELS = {"lora_mlp_kernel": True, "lora_qkv_kernel": True, "lora_o_kernel": True}
HOPPER = {"capabilities": {"compute_capability": "sm_90"}}


def test_nothing_is_compiled_without_a_gpu_or_against_what_is_written(tmp_path):
    config = make_tiny_model(tmp_path, "llama").config
    assert not compiles_layers(DictDefault(), config)
    assert not compiles_layers(DictDefault(torch_compile=False, **HOPPER), config)
    assert compiles_layers(DictDefault(torch_compile=True), config)
    assert compiles_layers(DictDefault(HOPPER), config)


def test_checkpointing_of_wide_layers_brings_offloading():
    wide = LlamaConfig(hidden_size=4096)
    cfg = {"micro_batch_size": 1, "sequence_len": 8192, **HOPPER}
    assert offloads_by_default(DictDefault(cfg), wide)
    assert not offloads_by_default(DictDefault(activation_offloading=False, **cfg), wide)
    assert not offloads_by_default(DictDefault(cfg), LlamaConfig(hidden_size=1024))
    two = {"compute_capability": "sm_90", "n_gpu": 2}
    assert not offloads_by_default(DictDefault({**cfg, "capabilities": two}), wide)


def test_lora_kernels_count_where_they_find_their_projections(tmp_path):
    cfg = DictDefault(KERNELS)
    fused = {}
    for kind in ("llama", "phi3"):
        model = make_tiny_model(tmp_path, kind)
        fused[kind] = lora_kernels_that_fit(cfg, model.config, decoder_layers(model)[0])
    assert fused == {"llama": set(KERNELS), "phi3": set()}
    # Another model with projections such as those of Phi-3, which has one for q, k and v and one for gate and up.
    layer = decoder_layers(model)[0]
    assert lora_kernels_that_fit(cfg, DictDefault(model_type="llama"), layer) == {"lora_o_kernel"}
    assert not lora_kernels_that_fit(cfg, DictDefault(model_type="deepseek_v3"), layer)


def test_sums_of_the_summing_kernel(tmp_path):
    """One for every element of the factors of gate, up and down, and block of 1,024 tokens; above rank 16 there are none."""
    make_tiny_model(tmp_path, "llama", num_hidden_layers=1, hidden_size=64, intermediate_size=128)

    def sums(rank, **keys):
        cfg = {"base_model": str(tmp_path), "sequence_len": 64, "adapter": "lora", "lora_r": rank, "bf16": True}
        cfg = DictDefault({**cfg, "lora_alpha": 8, "lora_target_linear": True, **KERNELS, **HOPPER, **keys})
        return read_run(cfg, *build_blank_model(cfg, LlamaConfig.from_pretrained(tmp_path))).layer.sums

    assert sums(16) == 128 * 3 * 16 / SUMMED_ROWS
    assert sums(32) == sums(16, torch_compile=False) == sums(16, bf16=False) == 0


def test_rows_of_the_loss():
    assert loss_rows(DictDefault(), 8192, 128256, 2) == 1024  # 2 * (2**26 // 128256) = 1046, in whole blocks
    assert loss_rows(DictDefault(), 8192, 32064, 4) == 2048
    assert loss_rows(DictDefault(chunked_cross_entropy=True), 8192, 32064, 4) == 1024
    assert loss_rows(DictDefault(), 8192, 10**6, 2) == 128  # never fewer than a block
    # A trained head: logits up to the size of its fp32 gradient, unless the number of chunks is given.
    assert loss_rows(DictDefault(), 8192, 128256, 2, 4096) == 4096
    assert loss_rows(DictDefault(), 8192, 128256, 2, 1024) == 2048
    assert loss_rows(DictDefault(chunked_cross_entropy=True), 8192, 128256, 2, 4096) == 1024  # as asked for


def test_the_machine_of_a_plan():
    named = planned_machine("t4")
    assert named is not None and named["compute_capability"] == "sm_75" and not named["bf16"] and named["n_gpu"] >= 1
    if torch.cuda.is_available():
        assert planned_machine(None) is None
    else:
        assumed = planned_machine(None)
        assert assumed is not None and assumed["compute_capability"] == capabilities_of("h100")["compute_capability"]


def test_a_plan_counts_what_galore_and_apollo_project(tmp_path):
    """Two layers of width 64 with an MLP of 128: AdamW for embedding, head and norms, the projected states for the rest."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = make_tiny_model(tmp_path, "llama", num_hidden_layers=2, **sizes)
    written = {"base_model": str(tmp_path), "sequence_len": 64, "optim_target_modules": "all_linear"}

    def bytes_of(optimizer, **keys):
        cfg = DictDefault({**written, "optimizer": optimizer, "optim_args": {"rank": 8}, **keys})
        run = read_run(cfg, *build_blank_model(cfg, model.config))
        return forecast(run).optimizer, forecast(run).gradients

    # q, k, v, o, gate, up, down; the head is a linear layer, and `all_linear` takes it as well.
    matrices = 2 * ([(64, 64)] * 4 + [(128, 64)] * 2 + [(64, 128)]) + [tuple(model.lm_head.weight.shape)]
    rest = sum(p.numel() for p in model.parameters()) - sum(rows * columns for rows, columns in matrices)
    low, projections = sum(8 * max(shape) for shape in matrices), sum(8 * min(shape) for shape in matrices)
    assert bytes_of("galore_adamw") == (4 * (2 * rest + 3 * low + projections), 4 * model.num_parameters())
    assert bytes_of("apollo_adamw")[0] == 4 * (2 * rest + 2 * low + projections)
    assert bytes_of("adamw_torch", optim_args=None)[0] == 4 * 2 * model.num_parameters()
    # Updates in the backward pass: one gradient at a time, the largest of which is that of the embedding or the head.
    assert bytes_of("apollo_adamw_layerwise")[1] == 4 * model.lm_head.weight.numel()


def test_a_run_that_does_not_fit_is_told_so_before_it_begins(tmp_path):
    make_tiny_model(tmp_path, "llama").config.save_pretrained(tmp_path)
    cfg = DictDefault(
        base_model=str(tmp_path), torch_dtype="bfloat16", bf16=True, sequence_len=65536, micro_batch_size=4,
        pad_to_sequence_len=True, optimizer="adamw_torch_fused", **HOPPER,
    )  # fmt: skip
    from axolotl.loaders.utils import load_model_config

    needed = forecast(read_run(cfg, *build_blank_model(cfg, load_model_config(cfg)))).total
    assert describe_shortage(cfg, None, needed) is None
    text = describe_shortage(cfg, None, needed - 1)
    assert text is not None and f"{needed / GIB:.1f} GiB" in text
    lines = text.splitlines()[1:]
    assert (
        lines[0].startswith("  micro_batch_size: 2, gradient_accumulation_steps x 2 (") and "same result)" in lines[0]
    )
    assert any("gradient_checkpointing: true" in line for line in lines)
    assert cfg.resolution is None
    assert describe_shortage(DictDefault({**cfg, "auto_find_batch_size": True}), None, 0) is None
