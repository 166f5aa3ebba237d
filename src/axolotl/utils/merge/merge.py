"""`merge_adapter`: base model + LoRA adapter -> a model folder, tensor by tensor."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers import PretrainedConfig

from axolotl.exceptions import ModelError, OutputError
from axolotl.utils.logging import get_logger
from axolotl.utils.merge.files import fresh_folder, local_base, put_in_place
from axolotl.utils.merge.four_bit import EightBit, FourBit
from axolotl.utils.merge.merged import MergedModel
from axolotl.utils.merge.proof import LogitProof, TrainedBase, compare_logits, dtype_that_fits
from axolotl.utils.merge.report import MergeReport
from axolotl.utils.merge.tensors import parse_size

LOG = get_logger(__name__)

# Largest accepted relative error of one merged layer's output: the rounding of the written weight.
LAYER_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def merge_adapter(
    base_dir: str | Path,
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    dequantize: bool = False,
    trained_on: FourBit | EightBit | None = None,
    revision: str | None = None,
    config: PretrainedConfig | None = None,
    trust_remote_code: bool = False,
    prove: bool = True,
) -> MergeReport:
    """Write base + adapter as a model that loads without PEFT.

    Every parameter is computed in float32 and cast once. Memory holds one layer at a time, whatever the model's size; only
    the comparison of whole models needs more, and it is made only when free memory allows.

    Args:
        base_dir: folder or hub id of the base model; safetensors or .bin files.
        adapter_dir: folder with adapter_config.json and its weights.
        output_dir: where the merged model goes; a folder of that name is replaced once the new one is whole and proven.
        dtype: dtype of the written floating tensors; None keeps the stored one.
        max_shard_size: size of the written files, such as `5GB`.
        dequantize: merge into the unquantized base although the adapter was trained on a quantized one.
        trained_on: how the base was quantized in training. The written base weights are the round trip of it unless
            `dequantize` is set, because those are the weights that the adapter was trained with.
        revision: of a base model on the hub.
        config: of the trained model; else `adapter_dir/config.json`, else the base model's.
        prove: compare the logits of both models where free memory allows.

    Raises:
        ModelError: not a LoRA adapter, not the adapter's base, or the merged model differs from base + adapter; in the
            last case what was written is kept beside `output_dir` with the suffix `.mismatch`.
        OutputError: `output_dir` cannot be written.
    """
    base, adapter, output = local_base(str(base_dir), revision), Path(adapter_dir), Path(output_dir)
    if output.resolve() in (base.resolve(), adapter.resolve()):
        raise OutputError(f"`{output}` is the folder of the base model or the adapter: a merge must not overwrite it.")
    merged = MergedModel(
        base,
        adapter,
        base_name=str(base_dir),
        config=config,
        dtype=dtype,
        trained_on=None if dequantize else trained_on,
        trust_remote_code=trust_remote_code,
    )
    aside = fresh_folder(output, "partial")
    try:
        report = merged.write(aside, parse_size(max_shard_size))
        check_layers(merged, report)
        if prove:
            report.logits, report.logits_skipped = prove_logits(merged, report)
        put_in_place(aside, output)
    except ModelError:
        if any(aside.glob("*.safetensors")):
            kept = fresh_folder(output, "mismatch")
            os.replace(aside, kept)
            LOG.error(f"what was written is kept in {kept}")
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    report.output_dir = output
    return report


def check_layers(merged: MergedModel, report: MergeReport) -> None:
    """Each merged layer gives what base and adapter give, up to the rounding of its dtype.

    Raises:
        ModelError: one does not.
    """
    for path, layer in report.fidelity.items():
        tolerance = LAYER_TOLERANCES.get(merged.dtype_of(f"{path}.weight"), 1e-5)
        if layer.output_error > tolerance:
            raise ModelError(
                f"The merged `{path}` differs from base + adapter by {layer.output_error:.1e} (accepted {tolerance:.0e})."
            )
    if report.mean_lost > 0.3:
        LOG.warning(
            f"rounding to {merged.dtype_of(merged.in_name)} takes {report.mean_lost:.0%} of what the adapter changed: the "
            "adapter is small against the weights' precision. Merge with `dtype` float32, or keep the adapter."
        )


def prove_logits(merged: MergedModel, report: MergeReport) -> tuple[LogitProof | None, str]:
    """The comparison of whole models, or None with the reason why they were not compared.

    Raises:
        ModelError: they do not answer alike.
    """
    written = merged.dtype_of(merged.in_name)
    dtype = dtype_that_fits(report.num_bytes // max(written.itemsize, 1), written)
    if dtype is None:
        return None, "free memory does not hold the model; each layer was compared by itself"
    proof = compare_logits(
        TrainedBase(
            merged.model_class,
            merged.base,
            config=merged.config,
            num_rows=merged.num_base_rows,
            trained_on=merged.trained_on,
            rounded=merged.rounded,
            trust_remote_code=merged.trust_remote_code,
        ),
        merged.adapter_dir,
        report.output_dir,
        dtype=dtype,
        written=written,
    )
    if not proof.holds:
        raise ModelError(f"The merged model does not answer as base + adapter do: {proof}.")
    return proof, ""
