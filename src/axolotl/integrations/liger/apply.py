"""Which of the `liger_*` keys about layers change something, and how it is said.

A layer that something better runs already is left to it: compiled layers fuse norms, rotations and activations with
everything around them, and the LoRA kernels fuse an MLP with its adapters.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from axolotl.exceptions import ModelError
from axolotl.integrations.liger.kernels import LigerKernels, load_liger_kernels, why_not_impl
from axolotl.integrations.liger.mlps import fuse_gated_mlps
from axolotl.integrations.liger.norms import fuse_layer_norms, fuse_rms_norms, torch_rms_norm
from axolotl.integrations.liger.rope import fuse_rope, restore_rope
from axolotl.integrations.liger.swap import restore
from axolotl.monkeypatch.compile_layers import CompiledForward
from axolotl.monkeypatch.lora_kernels import get_layers
from axolotl.monkeypatch.tiled_mlp import apply_tiled_mlp, remove_tiled_mlp
from axolotl.utils.dict import DictDefault, note_choice

LAYER_KEYS = ("liger_rope", "liger_rms_norm", "liger_rms_norm_gated", "liger_layer_norm", "liger_glu_activation")


def are_layers_compiled(model: nn.Module) -> bool:
    """Whether `torch_compile` has compiled the decoder layers."""
    try:
        layers = get_layers(model)
    except ModelError:
        return False
    return any(isinstance(vars(layer).get("forward"), CompiledForward) for layer in layers)


def why_no_kernels(model: nn.Module) -> str | None:
    """Why the layers of a model run as they are, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device: the plain layers run, with the same result"
    if are_layers_compiled(model):
        return "the compiled layers fuse it themselves; `torch_compile: false` leaves it to this kernel"
    return None


def apply_liger_kernels(cfg: DictDefault, model: nn.Module) -> None:
    """Put the kernels that `cfg` asks for into the layers of `model`, and note which run.

    Args:
        cfg: reads the `liger_*` keys about layers, `liger_kernel_impl` and `tiled_mlp`.
        model: the finished model, adapter included, on its device.
    """
    wanted = [key for key in LAYER_KEYS if cfg[key]]
    if not wanted:
        return
    reason = why_no_kernels(model)
    if reason is not None:
        for key in wanted:
            note_choice(cfg, key, False, reason)
        return
    liger = _load(cfg)
    if cfg.liger_rms_norm or cfg.liger_rms_norm_gated:
        kernel = torch_rms_norm if isinstance(liger, str) else liger.rms_norm
        name = f"PyTorch's kernel: {liger}" if isinstance(liger, str) else f"kernel of {liger.name}"
        for key, gate in (("liger_rms_norm", False), ("liger_rms_norm_gated", True)):
            if cfg[key]:
                _note(
                    cfg,
                    key,
                    "RMS norms with a gate" if gate else "RMS norms",
                    name,
                    fuse_rms_norms(model, kernel, gate=gate),
                )
    if cfg.liger_layer_norm:
        if isinstance(liger, str):
            note_choice(cfg, "liger_layer_norm", False, f"PyTorch's layer norm is one kernel too: {liger}")
        else:
            _note(
                cfg,
                "liger_layer_norm",
                "layer norms",
                f"kernel of {liger.name}",
                fuse_layer_norms(model, liger.layer_norm),
            )
    if cfg.liger_rope:
        if isinstance(liger, str):
            note_choice(cfg, "liger_rope", False, f"the plain rotation runs: {liger}")
        else:
            _note(cfg, "liger_rope", "kinds of rotation", f"kernel of {liger.name}", fuse_rope(model, liger.rope))
    if cfg.liger_glu_activation:
        if cfg.tiled_mlp:
            remove_tiled_mlp(model)
        _note(cfg, "liger_glu_activation", "gated MLPs", "kernel of axolotl.kernels.glu", fuse_gated_mlps(model))
        if cfg.tiled_mlp:
            apply_tiled_mlp(model, cfg.tiled_mlp_num_shards)


def remove_liger_kernels(model: nn.Module) -> None:
    """Undo `apply_liger_kernels`."""
    restore(model)
    restore_rope(model)


def _load(cfg: DictDefault) -> LigerKernels | str:
    impl = cfg.liger_kernel_impl
    reason = why_not_impl(impl) if impl else None
    if reason:
        note_choice(cfg, "liger_kernel_impl", None, reason)
    return load_liger_kernels(None if reason else impl)


def _note(cfg: DictDefault, key: str, what: str, kernel: str, results: list[str | None]) -> None:
    """Say how many layers run fused, by which kernel, and why the others do not."""
    if not results:
        note_choice(cfg, key, False, f"the model has no {what}")
        return
    reasons = Counter(reason for reason in results if reason)
    rest = "; ".join(f"{count} stay because {reason}" for reason, count in reasons.most_common())
    count = results.count(None)
    note_choice(
        cfg, key, f"{count} of {len(results)} {what}", f"{kernel if count else 'none fits'}{'; ' if rest else ''}{rest}"
    )
