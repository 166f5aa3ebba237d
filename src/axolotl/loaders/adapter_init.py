"""Starts of LoRA that change the base weights: PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ.

All but LoftQ take an initial `s·B0·A0` out of the base weight and train from there, so that trained matrices alone say
nothing about the base model on the disk. What is saved is therefore the difference `s·(B·A - B0·A0)`, a plain LoRA of twice
the rank: `[B, -B0]` and `[A; A0]`. It loads and merges anywhere without doing the start again, and holds both halves that
a resumed run needs.

LoftQ trains on the rounded base weight. The rounding follows from the weight and the number of bits, and is done again
whenever such an adapter is loaded or merged.

Sources: PiSSA https://arxiv.org/abs/2404.02948, OLoRA https://arxiv.org/abs/2406.01775, LoftQ
https://arxiv.org/abs/2310.08659 (algorithm 1 with T = 1; B is divided by LoRA's scale, so that the start is near W).
"""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import nn

from axolotl.exceptions import ConfigError, MissingExtraError, ModelError
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

ADAPTER = "default"  # the name that peft gives an adapter
PEFT_PREFIX = "base_model.model."  # of the names of a model's parameters, once it is adapted
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The dimension that holds the rank, by the kind of matrix.
_RANK_DIMS = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}
# In a file `layer.lora_A.weight`, in a model `layer.lora_A.default.weight`; those of embeddings without `.weight`.
_MATRIX = re.compile(rf"(?P<layer>.+)\.(?P<kind>lora_(?:embedding_)?[AB])(?:\.{ADAPTER})?(?:\.weight)?")


def takes_out_of_base(init: Any) -> bool:
    """Whether a value of `peft_init_lora_weights` takes the initial matrices out of the base weight."""
    return isinstance(init, str) and (init in ("olora", "pissa", "corda", "lora_ga") or init.startswith("pissa_niter_"))


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer) of every layer under LoRA."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    ]


# --- an initial product out of the base -------------------------------------------------------------------------------


def save_as_difference(model: PeftModel) -> None:
    """Make a model whose adapter was just made save plain LoRA differences to its start, and read them back.

    The model gets a class of its own: peft has no hook between its state and the file.

    Raises:
        ConfigError: the rank is larger than a layer.
    """
    for name, module in lora_layers(model):
        if module.lora_A[ADAPTER].weight.shape[0] != module.r[ADAPTER]:
            raise ConfigError(
                f"`lora_r: {module.r[ADAPTER]}` is larger than the layer `{name}` with {module.out_features} x "
                f"{module.in_features} weights, which has only {module.lora_A[ADAPTER].weight.shape[0]} directions to start from. "
                "Lower `lora_r`, or give the layer less in `lora_rank_pattern`."
            )
    initial = {
        name: (module.lora_A[ADAPTER].weight.detach().clone(), module.lora_B[ADAPTER].weight.detach().clone())
        for name, module in lora_layers(model)
    }
    model.__class__ = type(type(model).__name__, (_SavesDifference, type(model)), {})
    model.initial = initial


class _SavesDifference(PeftModel):
    """Mixin.

    Attributes:
        initial: layer -> (A0, B0), which the base weights lack.
    """

    initial: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """`PeftModel.save_pretrained` of the difference."""
        state = kwargs.pop("state_dict", None)
        doubled = _doubled(self.state_dict() if state is None else state, self.initial)
        with _config_for_saving(self) as config:
            _double_config(config)
            super().save_pretrained(save_directory, *args, state_dict=doubled, **kwargs)

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """`PeftModel.load_adapter` for the first half of a difference; the second half is taken out of the base."""
        weights = load_peft_weights(str(model_id), device="cpu")
        layer, (first, _) = next(iter(self.initial.items()))
        if weights[f"{layer}.lora_A.weight"].shape[0] != 2 * first.shape[0]:
            return super().load_adapter(model_id, adapter_name, *args, **kwargs)
        trained, initial = _halves(weights)
        self.start_from(initial)
        with tempfile.TemporaryDirectory() as folder:
            save_file(trained, Path(folder) / WEIGHTS)
            return super().load_adapter(folder, adapter_name, *args, **kwargs)

    @torch.no_grad()
    def start_from(self, initial: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Change the base weights from those of this start to those of another one; layers without a new one stay."""
        changed = 0
        for name, module in lora_layers(self):
            (a, b), (saved_a, saved_b) = self.initial[name], initial.get(name, self.initial[name])
            saved_a, saved_b = saved_a.to(a), saved_b.to(b)
            if torch.equal(a, saved_a) and torch.equal(b, saved_b):
                continue
            changed += bool(b.any())  # B = 0: this layer has not been started yet
            shift = module.scaling[ADAPTER] * (b.float() @ a.float() - saved_b.float() @ saved_a.float())
            weight = module.get_base_layer().weight
            weight.data = (weight.float() + (shift.T if module.fan_in_fan_out else shift)).to(weight.dtype)
            self.initial[name] = (saved_a, saved_b)
        if changed:
            LOG.warning(
                f"{changed} layers start from other matrices here than in the checkpoint (another machine or seed): the base "
                "weights are those of the checkpoint up to rounding."
            )


@torch.no_grad()
def start_from(model: PeftModel, starts: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Start layers of a model of `save_as_difference` from these A0 and B0, which are taken out of its base."""
    assert isinstance(model, _SavesDifference)
    model.start_from(starts)
    for name, module in lora_layers(model):
        if name not in starts:
            continue
        for matrix, initial in zip((module.lora_A, module.lora_B), model.initial[name], strict=True):
            matrix[ADAPTER].weight.copy_(initial)
        measure_magnitude(module)


def measure_magnitude(module: Any) -> None:
    """DoRA measures the weight that it starts with."""
    if ADAPTER in module.lora_variant:
        module.lora_variant[ADAPTER].init(module, ADAPTER)


def _doubled(
    state: dict[str, torch.Tensor], initial: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """`[A; A0]` and `[B, -B0]`. Matrices without a start, those of embeddings, are filled up with zeros."""
    doubled = {}
    for key, tensor in state.items():
        match = _MATRIX.fullmatch(key)
        if match is None:
            doubled[key] = tensor
            continue
        kind = match["kind"]
        second = torch.zeros_like(tensor)
        if match["layer"] in initial:
            a, b = initial[match["layer"]]
            second = (a if kind == "lora_A" else -b).to(tensor)
        doubled[key] = torch.cat([tensor, second], dim=_RANK_DIMS[kind]).contiguous()
    return doubled


def _halves(
    weights: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """What `_doubled` put together: the trained state, and layer -> (A0, B0)."""
    trained, starts = {}, {}
    for key, tensor in weights.items():
        match = _MATRIX.fullmatch(key)
        if match is None:
            trained[key] = tensor
            continue
        first, second = tensor.chunk(2, dim=_RANK_DIMS[match["kind"]])
        trained[key] = first.contiguous()
        starts.setdefault(match["layer"], {})[match["kind"]] = second
    pairs = {layer: (s["lora_A"], -s["lora_B"]) for layer, s in starts.items() if "lora_A" in s}
    return trained, pairs


def _double_config(config: LoraConfig) -> None:
    """Twice the rank at the same scale: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA."""
    factor: Any = math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: factor * alpha for key, alpha in (config.alpha_pattern or {}).items()}
    config.init_lora_weights = True


@contextmanager
def _config_for_saving(model: PeftModel) -> Iterator[LoraConfig]:
    """A copy of the adapter's config in its place, to be changed while the adapter is saved."""
    config = model.peft_config[ADAPTER]
    assert isinstance(config, LoraConfig)
    model.peft_config[ADAPTER] = changed = copy.deepcopy(config)
    try:
        yield changed
    finally:
        model.peft_config[ADAPTER] = config


# --- LoftQ ------------------------------------------------------------------------------------------------------------


def round_trip(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """`weight` (out, in) rounded to NF4 in blocks of 64 or to int8 by rows, and back, in float32.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "bitsandbytes", f"`loftq_config: {{loftq_bits: {bits}}}`") from error
    if bits == 4:
        packed, state = functional.quantize_4bit(
            weight.detach().float().contiguous(), compress_statistics=False, quant_type="nf4"
        )
        return functional.dequantize_4bit(packed, state).reshape(weight.shape).float()
    rounded, scales, _ = functional.int8_vectorwise_quant(weight.detach().to(torch.float16).contiguous())
    return functional.int8_vectorwise_dequant(rounded, scales).float()


@torch.no_grad()
def start_with_loftq(model: PeftModel, bits: int) -> None:
    """Round the base weights under LoRA, and start `B·A` at the best approximation of what the rounding took.

    Raises:
        ConfigError: a layer under LoRA is no linear layer.
    """
    for name, module in lora_layers(model):
        base = _linear_base(name, module)
        rounded = round_trip(base.weight, bits).to(base.weight.dtype)
        matrix_a, matrix_b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        left, values, right = torch.linalg.svd(base.weight.float() - rounded.float(), full_matrices=False)
        base.weight.data = rounded
        rank = matrix_a.shape[0]
        root = values[:rank].sqrt()
        matrix_a.data = (root[:, None] * right[:rank]).to(matrix_a)
        matrix_b.data = (left[:, :rank] * root / module.scaling[ADAPTER]).to(matrix_b)
        measure_magnitude(module)
    remember_loftq(model, bits)


@torch.no_grad()
def round_base(model: PeftModel, bits: int) -> None:
    """Round the base weights under a LoftQ adapter that was loaded."""
    for name, module in lora_layers(model):
        weight = _linear_base(name, module).weight
        weight.data = round_trip(weight, bits).to(weight.dtype)
    remember_loftq(model, bits)


def _linear_base(name: str, module: Any) -> nn.Linear:
    base = module.get_base_layer()
    if not isinstance(base, nn.Linear):
        raise ConfigError(
            f"`peft: {{loftq_config: ...}}` rounds linear layers, but LoRA is on `{name}`, a {type(base).__name__}. Take it out of "
            "`lora_target_modules`, or drop `loftq_config`."
        )
    return base


def remember_loftq(model: PeftModel, bits: int) -> None:
    """Make the model write into its config that its base is rounded, as peft reads it."""
    model.__class__ = type(type(model).__name__, (_SavesLoftQ, type(model)), {})
    model.loftq_bits = bits


class _SavesLoftQ(PeftModel):
    """Mixin.

    Attributes:
        loftq_bits: what the base weights are rounded to.
    """

    loftq_bits: int

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """`PeftModel.save_pretrained`, with `init_lora_weights: loftq` in the config."""
        with _config_for_saving(self) as config:
            config.init_lora_weights = "loftq"
            config.loftq_config = {"loftq_bits": self.loftq_bits, "loftq_iter": 1}
            super().save_pretrained(save_directory, *args, **kwargs)


# --- loading what was trained -----------------------------------------------------------------------------------------


def read_lora_config(folder: Path) -> tuple[LoraConfig, int | None]:
    """The config of a LoRA adapter, and the bits of LoftQ or None.

    peft asks for scipy and a GPU when it reads a LoftQ config, and would round again: such a config comes back as that of
    plain LoRA.
    """
    written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    bits = None
    if str(written.get("init_lora_weights")).lower() == "loftq":
        bits = int((written.get("loftq_config") or {}).get("loftq_bits", 4))
        written.update(init_lora_weights=True, loftq_config={})
    config = LoraConfig.from_peft_type(**written)
    assert isinstance(config, LoraConfig)
    return config, bits


def load_trained(model: Any, folder: str | Path, **keywords: Any) -> PeftModel:
    """`PeftModel.from_pretrained`, with the base weights rounded again for a LoftQ adapter."""
    path = Path(folder)
    if not (path / CONFIG).is_file() or '"loftq"' not in (path / CONFIG).read_text(encoding="utf-8"):
        try:
            return PeftModel.from_pretrained(model, str(folder), **keywords)
        except KeyError as error:
            raise ModelError(
                f"`{folder}/{CONFIG}` is no config of an adapter: `peft_type` is missing, or one that peft does not know "
                f"({error}). Copy or save the adapter again."
            ) from error
    config, bits = read_lora_config(path)
    adapted = PeftModel.from_pretrained(model, str(folder), config=config, **keywords)
    if bits is not None:
        round_base(adapted, bits)
    return adapted
