"""CLI to merge a trained LoRA into a base model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from axolotl.cli.config import find_config, load_cfg, read_config
from axolotl.cli.utils.overrides import apply_overrides
from axolotl.core.checkpoint import list_checkpoints
from axolotl.exceptions import ConfigError, ModelError, NotBuiltError
from axolotl.loaders import load_model_config, load_tokenizer
from axolotl.loaders.model import read_dtype
from axolotl.loaders.utils import read_base_model, read_revision
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.merge import EightBit, FourBit, MergeReport, merge_adapter
from axolotl.utils.merge.files import fresh_folder, put_in_place

LOG = get_logger(__name__)

# A merge computes on the CPU, one tensor at a time: how the run trained the model does not matter to it.
FORCED: dict[str, Any] = {
    "merge_lora": True,
    "load_in_8bit": False,
    "load_in_4bit": False,
    "quantize_moe_experts": False,
    "ple_cpu_offload": False,
    "sample_packing": False,
}
DROPPED = (
    "attn_implementation", "flash_attention", "sdp_attention", "flex_attention", "xformers_attention", "eager_attention",
    "s2_attention", "sage_attention", "context_parallel_size", "deepspeed", "fsdp", "fsdp_config", "eval_sample_packing",
)  # fmt: skip


def do_cli(config: Path | str | DictDefault = Path("examples/"), **kwargs: Any) -> None:
    """Parses axolotl config, CLI args, and calls `do_merge_lora`. Note that various config values will be overwritten to
    allow the LoRA merge logic to work as expected (`load_in_8bit=False`, `load_in_4bit=False`, `flash_attention=False`).

    Args:
        config: path of the config.
        kwargs: `dequant`, `override_quantizer`, and overrides of the config.

    Raises:
        ConfigError: the config is wrong, or trains no adapter. Also a ValueError.
        ModelError: there is no adapter. Also a ValueError.
    """
    dequant = bool(kwargs.pop("dequant", None))
    override_quantizer = kwargs.pop("override_quantizer", None)
    written = DictDefault(config if isinstance(config, dict) else read_config(find_config(config)))
    apply_overrides(written, {key: value for key, value in kwargs.items() if value is not None})
    if not written.adapter:
        raise ConfigError(
            "`axolotl merge-lora` needs a config with an `adapter`; this one trains the whole model, and what it "
            "saved in `output_dir` needs no merge."
        )
    trained_in_bits = read_bits(written)
    for key in DROPPED:
        written.pop(key, None)
    written.update(FORCED)
    cfg = load_cfg(written)
    do_merge_lora(cfg=cfg, dequant=dequant, override_quantizer=override_quantizer, trained_in_bits=trained_in_bits)


def do_merge_lora(
    *,
    cfg: DictDefault,
    dequant: bool = False,
    override_quantizer: str | None = None,
    trained_in_bits: int | None = None,
) -> MergeReport | None:
    """Merge the adapter of a run into its base model, in `<output_dir>/merged`.

    The merge streams the base model's files (`axolotl.utils.merge`). With `merge_method: legacy` the model is loaded
    whole and PEFT's `merge_and_unload` is called.

    Args:
        cfg: the config of a run, as `load_cfg` returns it. `lora_model_dir` defaults to `output_dir`.
        dequant: merge an adapter into the unquantized weights, and not into those in 4 or 8 bits that it was trained on.
        override_quantizer: not implemented here.
        trained_in_bits: bits of the base during training, 4 or 8, or 0 for an unquantized one; None reads it from `cfg`.

    Returns:
        What was merged and how exactly; None with `merge_method: legacy`.
    """
    if override_quantizer:
        raise NotBuiltError(
            f"`--override-quantizer {override_quantizer}`: merged weights are not quantized again. Leave the option out."
        )
    adapter_dir = Path(cfg.lora_model_dir or cfg.output_dir)
    output_dir = Path(cfg.output_dir) / "merged"
    _check_adapter(adapter_dir)
    if cfg.merge_method == "legacy":
        _merge_whole(cfg, adapter_dir, output_dir)
        return None
    bits = read_bits(cfg) if trained_in_bits is None else trained_in_bits
    base_model = read_base_model(DictDefault({**cfg, "lora_model_dir": str(adapter_dir)}))
    LOG.info(f"merging {adapter_dir} into {base_model}")
    report = merge_adapter(
        base_model,
        adapter_dir,
        output_dir,
        dequantize=dequant,
        trained_on=read_quantization(cfg, bits),
        revision=read_revision(cfg, base_model),
        config=None if (adapter_dir / "config.json").is_file() else load_model_config(cfg),
        trust_remote_code=bool(cfg.trust_remote_code),
    )
    if not any(adapter_dir.glob("tokenizer*")):
        load_tokenizer(cfg).save_pretrained(output_dir)
    for line in report.lines():
        LOG.info(line)
    return report


def read_bits(cfg: DictDefault) -> int:
    """Bits of the base model's weights in the training that a config describes; 0 when they are not quantized."""
    if cfg.adapter == "qlora" or cfg.load_in_4bit:
        return 4
    return 8 if cfg.load_in_8bit else 0


def read_quantization(cfg: DictDefault, bits: int) -> FourBit | EightBit | None:
    """How the run quantized its base: NF4 with double quantization, or rows in 8 bits, changed by `bnb_config_kwargs`."""
    options = cfg.bnb_config_kwargs or DictDefault()
    skipped = tuple(options.llm_int8_skip_modules or ())
    if bits == 8:
        return EightBit(skip_modules=skipped)
    if bits != 4:
        return None
    double = options.bnb_4bit_use_double_quant
    return FourBit(
        quant_type=options.bnb_4bit_quant_type or "nf4",
        double_quant=True if double is None else bool(double),
        compute_dtype=read_dtype(cfg),
        skip_modules=skipped,
    )


def _check_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        return
    checkpoints = list_checkpoints(folder)
    hint = f" The run has a checkpoint: `--lora-model-dir {checkpoints[-1]}`." if checkpoints else ""
    raise ModelError(
        f"`{folder}` holds no adapter (no adapter_config.json). Train first, or say where the adapter is with "
        f"`--lora-model-dir`.{hint}"
    )


def _merge_whole(cfg: DictDefault, adapter_dir: Path, output_dir: Path) -> None:
    from axolotl.loaders import ModelLoader

    cfg = DictDefault(cfg)
    cfg.lora_model_dir = str(adapter_dir)
    tokenizer = load_tokenizer(cfg)
    model, _ = ModelLoader(cfg, tokenizer, inference=True).load()
    aside = fresh_folder(output_dir, "partial")
    try:
        model.merge_and_unload(progressbar=True).save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        put_in_place(aside, output_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    LOG.info(f"merged with `merge_method: legacy` into {output_dir}; logits were not compared")


if __name__ == "__main__":
    from axolotl.cli.main import run_module

    run_module("merge-lora")
