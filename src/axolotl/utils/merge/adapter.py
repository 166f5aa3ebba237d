"""What a LoRA adapter does to each parameter of its base model.

PEFT builds the adapter on a model without weights (meta device), so ranks, scales, patterns and target rules are PEFT's
own reading of `adapter_config.json`. Then one adapted module at a time is given its weights in float32 and merged by its
own layer class, which knows LoRA, rsLoRA, DoRA, biases, embeddings, convolutions and 3-D expert parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from axolotl.exceptions import ModelError
from axolotl.loaders.adapter_init import ADAPTER, PEFT_PREFIX, read_lora_config, round_trip
from axolotl.utils.merge.tensors import TensorStore

BASE_CHANGING_INITS = ("corda", "lora_ga")  # change the base weights in a way that cannot be redone from files
NUM_PROBES = 4

ReadParam = Callable[[str], torch.Tensor]


@dataclass
class Change:
    """One module's parameters, changed together.

    Args:
        path: the module's name in the plain model.
        shapes: parameter name in the plain model -> its shape after the merge.
        keys: names of the adapter tensors that this change uses.
        module: the PEFT layer on the meta device; None where tensors are replaced as they are.
        rows: for trained tokens, the row numbers that the adapter's tensor replaces.
    """

    path: str
    shapes: dict[str, tuple[int, ...]]
    keys: dict[str, str] = field(default_factory=dict)  # name inside the module -> adapter tensor
    module: LoraLayer | None = None
    rows: list[int] | None = None
    base_key: str | None = None  # with `rows`: the adapter's own copy of the base embedding, saved when it was resized


@dataclass(frozen=True)
class Fidelity:
    """How near a merged layer is to the unmerged one.

    Args:
        output_error: RMS of (merged output - adapter output) over RMS of the adapter output, on random inputs.
        lost: RMS of the rounding of the merged weight over RMS of what the adapter added to it.
    """

    output_error: float
    lost: float


# Parameter name -> merged tensor; None where the layer class has no plain matrix to probe.
Merged = tuple[dict[str, torch.Tensor], Fidelity | None]


def load_lora_config(adapter_dir: Path) -> tuple[LoraConfig, int | None]:
    """The adapter's config, and the bits that LoftQ rounded its base to, or None.

    Raises:
        ModelError: not a LoRA adapter, or one whose effect is not a change of weights.
    """
    if not (adapter_dir / "adapter_config.json").is_file():
        raise ModelError(
            f"`{adapter_dir}` holds no adapter (no adapter_config.json). Train one first, or say where it is with "
            "`--lora-model-dir`."
        )
    try:
        kind = PeftConfig._get_peft_type(str(adapter_dir))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"`{adapter_dir}/adapter_config.json` is no config of an adapter ({type(error).__name__}: {error}). Copy or save "
            "the adapter again."
        ) from error
    if kind != PeftType.LORA:
        raise ModelError(
            f"`{adapter_dir}` is a {kind} adapter; only LORA adapters can be merged shard by shard. "
            "Keep it unmerged, or merge it with PEFT's `merge_and_unload`."
        )
    config, loftq_bits = read_lora_config(adapter_dir)
    unmergeable = [
        name for name in ("alora_invocation_tokens", "arrow_config", "use_qalora") if config.to_dict().get(name)
    ]
    if unmergeable:
        raise ModelError(
            f"The adapter uses `{unmergeable[0]}`, whose effect is not a change of weights: no merge exists."
        )
    init = str(config.init_lora_weights).lower()
    if init in BASE_CHANGING_INITS or "_niter_" in init:
        raise ModelError(
            f"`peft_init_lora_weights: {config.init_lora_weights}` also changed the base weights when training began, and "
            "that change cannot be redone from the files. Save the adapter with `path_initial_model_for_weight_conversion`."
        )
    return config, loftq_bits


class Adapter:
    """The changes that an adapter makes, by parameter of the plain model.

    Args:
        model: the plain model on the meta device. PEFT adds its layers to it.
        config: from `load_lora_config`.
        store: the adapter's tensors.
        loftq_bits: what LoftQ rounded the base weights to, or None.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig, store: TensorStore, loftq_bits: int | None = None):
        self.store = store
        self._loftq_bits = loftq_bits
        self._init = str(config.init_lora_weights).lower()
        blank = copy.deepcopy(config)
        blank.init_lora_weights = True  # the weights come from the file
        blank.lora_dropout = 0.0
        blank.layer_replication = None  # `model` has its layers already
        blank.base_model_name_or_path = model.name_or_path  # peft warns when they differ
        plain_shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        try:
            peft_model = get_peft_model(model, blank, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ModelError(
                f"The adapter does not fit the base model: {error} It was trained on another one: check `base_model`."
            ) from error
        self.changes: dict[str, Change] = {}
        self._spare: set[str] = set()  # saved by PEFT twice, and the same as a tensor that is used
        inside = "\n"
        for name, module in peft_model.named_modules():
            if name.startswith(inside + "."):
                continue
            change = self._change_of(name, module, plain_shapes)
            if change:
                inside = name
                self.changes.update(dict.fromkeys(change.shapes, change))
        self._add_loose_tensors(plain_shapes)
        self._check_all_used()

    def _change_of(self, name: str, module: nn.Module, plain_shapes: dict[str, tuple[int, ...]]) -> Change | None:
        path = name.removeprefix(PEFT_PREFIX)
        if isinstance(module, ModulesToSaveWrapper):
            names = list(module.modules_to_save[ADAPTER].state_dict())
            keys = {f"{path}.{key}": f"{name}.{key}" for key in names}
            missing = [key for key in keys.values() if key not in self.store.tensors]
            if missing:
                raise ModelError(f"The adapter lacks `{missing[0]}`, though `modules_to_save` names it. Save it again.")
            # beside a resized embedding PEFT saves a second copy of it and the frozen original
            self._spare |= {f"{name}.{kind}.{key}" for key in names for kind in ("modules_to_save", "original_module")}
            return Change(path, {param: self.store.tensors[key].shape for param, key in keys.items()}, keys)
        if isinstance(module, TrainableTokensWrapper):
            owner = module.token_adapter.tied_adapter or module.token_adapter
            param = f"{path}.weight"
            keys = {param: self._key_of_tokens(name, module)}
            base_key = f"{name}.token_adapter.base_layer.weight"
            shape = plain_shapes[param]
            rows = list(owner.token_indices[ADAPTER])
            if base_key not in self.store.tensors:
                return Change(path, {param: shape}, keys, rows=rows)
            self._spare.add(f"{name}.original_module.weight")
            return Change(path, {param: shape}, keys | {"base": base_key}, rows=rows, base_key=base_key)
        if isinstance(module, LoraLayer):
            return self._lora_change(name, path, module, plain_shapes)
        return None

    def _key_of_tokens(self, name: str, module: TrainableTokensWrapper) -> str:
        key = f"{name}.token_adapter.trainable_tokens_delta"
        if key in self.store.tensors:
            return key
        others = [other for other in self.store.tensors if other.endswith(".token_adapter.trainable_tokens_delta")]
        if module.token_adapter.tied_adapter is not None and len(others) == 1:
            return others[0]
        raise ModelError(f"The adapter lacks `{key}`, the trained rows of its tokens. Save it again.")

    def _lora_change(self, name: str, path: str, module: LoraLayer, plain_shapes: dict[str, tuple[int, ...]]) -> Change:
        keys: dict[str, str] = {}
        changed = _changed_params(module)
        for inner in module.state_dict():
            key = f"{name}.{_without_adapter_name(inner)}"
            short = key.removesuffix(".weight")
            if key in self.store.tensors:
                keys[inner] = key
            elif short in self.store.tensors:  # `lora_magnitude_vector` is saved without `.weight`
                keys[inner] = short
            elif "lora_" in inner:
                raise ModelError(f"The adapter lacks `{key}`, which its config asks for. Save it again.")
            if inner in keys and "lora_" not in inner:
                changed.add(inner.replace("base_layer.", ""))
        shapes = {}
        for param in sorted(changed):
            inner = next((i for i in keys if "lora_" not in i and i.replace("base_layer.", "") == param), None)
            full = f"{path}.{param}"
            shapes[full] = self.store.tensors[keys[inner]].shape if inner else plain_shapes[full]
        return Change(path, shapes, keys, module=module)

    def _add_loose_tensors(self, plain_shapes: dict[str, tuple[int, ...]]) -> None:
        """Tensors saved under the name of a base parameter: resized embeddings, `bias: all`."""
        for key, info in self.store.tensors.items():
            param = key.removeprefix(PEFT_PREFIX)
            if key.startswith(PEFT_PREFIX) and param in plain_shapes and param not in self.changes:
                self.changes[param] = Change(param.rpartition(".")[0], {param: info.shape}, {param: key})

    def _check_all_used(self) -> None:
        used = {key for change in self.changes.values() for key in change.keys.values()}
        unused = [key for key in self.store.tensors if key not in used | self._spare]
        if unused:
            raise ModelError(
                f"{len(unused)} tensors of the adapter belong to no parameter of the base model, such as `{unused[0]}`. "
                "The adapter was trained on another base model: check `base_model`."
            )

    def apply(self, change: Change, read: ReadParam, dtype_of: Callable[[str], torch.dtype]) -> Merged:
        """The parameters of one change, merged and cast.

        Args:
            read: parameter name -> base weight.
            dtype_of: parameter name -> dtype to write.

        Returns:
            (parameter name -> tensor, Fidelity or None where the layer class has no plain matrix to probe)
        """
        if change.module is not None:
            return self._apply_lora(change, read, dtype_of)
        merged = {}
        for param in change.shapes:
            value = self.store.read(change.keys[param])
            if change.rows is not None:
                weight = (self.store.read(change.base_key) if change.base_key else read(param)).clone()
                weight[change.rows] = value.to(weight.dtype)
                value = weight
            merged[param] = value.to(dtype_of(param))
        return merged, None

    def _apply_lora(self, change: Change, read: ReadParam, dtype_of: Callable[[str], torch.dtype]) -> Merged:
        assert change.module is not None
        module = copy.deepcopy(change.module).to_empty(device="cpu").to(torch.float32).eval()
        state = {}
        for inner in module.state_dict():
            if inner in change.keys:
                state[inner] = self.store.read(change.keys[inner])
            else:
                state[inner] = read(f"{change.path}.{inner.replace('base_layer.', '')}")
        if self._init in ("pissa", "olora") and ADAPTER in module.lora_A:
            state["base_layer.weight"] = _residual(module, self._init, state["base_layer.weight"])
        if self._loftq_bits is not None:
            state["base_layer.weight"] = round_trip(state["base_layer.weight"], self._loftq_bits)
        try:
            module.load_state_dict({name: tensor.to(torch.float32) for name, tensor in state.items()})
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise ModelError(
                f"The adapter's weights of `{change.path}` have other shapes than its adapter_config.json and the base model "
                f"make: {said} Check `base_model`, and that config and weights are of one training."
            ) from error
        base = module.get_base_layer()
        with torch.no_grad():
            probe = _probe_of(base)
            expected = module(probe) if probe is not None else None
            before = base.weight.clone() if probe is not None else None
            for layer in _wrappers(module)[::-1]:
                layer.merge()
            merged = {p: base.get_parameter(p.rpartition(".")[2]).detach().to(dtype_of(p)) for p in change.shapes}
            if probe is None or expected is None or before is None:
                return merged, None
            exact = base.weight.clone()
            for param, tensor in merged.items():
                base.get_parameter(param.rpartition(".")[2]).copy_(tensor)
            fidelity = Fidelity(
                output_error=_rms_ratio(base(probe) - expected, expected),
                lost=_rms_ratio(base.weight - exact, exact - before),
            )
        return merged, fidelity


def _changed_params(module: LoraLayer) -> set[str]:
    """Names of base parameters that merging this layer changes."""
    wrappers = [layer for layer in _wrappers(module) if isinstance(layer, ParamWrapper)]
    if wrappers:
        return {layer.parameter_name for layer in wrappers}
    if module.lora_bias.get(ADAPTER):
        if module.get_base_layer().bias is None:
            raise ModelError(
                "The adapter was trained with `lora_bias`, but the layers it adapts have no bias to merge it into. "
                "Keep the adapter unmerged."
            )
        return {"weight", "bias"}
    return {"weight"}


def _wrappers(module: nn.Module) -> list[LoraLayer]:
    """A LoRA layer and those nested in it (several parameters of one module), outermost first."""
    found = []
    while isinstance(module, LoraLayer):
        found.append(module)
        module = module.base_layer
    return found


def _without_adapter_name(name: str) -> str:
    parts = name.split(".")
    for index in range(len(parts) - 1, 0, -1):
        if parts[index] == ADAPTER and parts[index - 1].startswith("lora_"):
            return ".".join(parts[:index] + parts[index + 1 :])
    return name


def _residual(module: LoraLayer, init: str, weight: torch.Tensor) -> torch.Tensor:
    """PiSSA and OLoRA train on what is left of the base weight after their initial B@A is taken out of it."""
    base = module.get_base_layer()
    base.weight.data = weight.clone()
    if init == "pissa":
        module.pissa_init(ADAPTER, init)
    else:
        module.olora_init(ADAPTER)
    return base.weight.data


def _probe_of(base: nn.Module) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(0)
    if isinstance(base, nn.Linear):
        return torch.randn(NUM_PROBES, base.in_features, generator=generator)
    if isinstance(base, Conv1D):
        return torch.randn(NUM_PROBES, base.weight.shape[0], generator=generator)
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, (64,), generator=generator)
    return None


def _rms_ratio(difference: torch.Tensor, of: torch.Tensor) -> float:
    """RMS of `difference` over RMS of `of`; 0 when both vanish."""
    top = difference.float().pow(2).mean().sqrt().item()
    bottom = of.float().pow(2).mean().sqrt().item()
    return top / bottom if bottom > 0 else (0.0 if top == 0 else math.inf)
