"""`MergedModel`: what each tensor of a merged model is made of, one at a time, in memory for one layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from axolotl.exceptions import ModelError
from axolotl.loaders.adapter_base import check_fits_base
from axolotl.loaders.adapter_init import PEFT_PREFIX
from axolotl.utils.logging import get_logger
from axolotl.utils.merge.adapter import Adapter, Change, Fidelity, load_lora_config
from axolotl.utils.merge.files import copy_generation_config, copy_side_files
from axolotl.utils.merge.four_bit import (
    EightBit,
    FourBit,
    check_base_is_mergeable,
    is_side_tensor,
    quantized_params,
    read_stored,
)
from axolotl.utils.merge.names import Group, NameMap
from axolotl.utils.merge.replication import ReplicatedStore, list_sources, replicate_config
from axolotl.utils.merge.report import MergeReport
from axolotl.utils.merge.tensors import TensorInfo, TensorStore, adapter_file, model_files, write_model

LOG = get_logger(__name__)


class MergedModel:
    """What each tensor of the merged model is made of.

    Args:
        base: folder of the base model.
        adapter_dir: folder of the adapter.
        base_name: the base model as the user wrote it.
        config: of the trained model; None for the one beside the adapter, or the base model's.
        dtype: dtype of the written floating tensors; None keeps the stored one.
        trained_on: how the base was quantized in training, when the merge reproduces it.
        trust_remote_code: whether code of the base model may run.

    Attributes:
        adapter: the changes.
        fidelity: path of a module -> how near its merged layer is to the unmerged one, of those written so far.
        rounded: weights that are written as the round trip of their quantization.
    """

    def __init__(
        self,
        base: Path,
        adapter_dir: Path,
        *,
        base_name: str,
        config: PretrainedConfig | None = None,
        dtype: torch.dtype | None = None,
        trained_on: FourBit | EightBit | None = None,
        trust_remote_code: bool = False,
    ):
        self.base, self.adapter_dir, self.dtype = base, adapter_dir, dtype
        self.trust_remote_code = trust_remote_code
        lora_config, loftq_bits = load_lora_config(adapter_dir)
        base_config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        check_fits_base(adapter_dir, base_config, key="lora_model_dir", base_name=base_name)
        self.store = TensorStore(model_files(base))
        if lora_config.layer_replication:
            # What training saved as config knows the number of layers, but not always their types.
            sources = list_sources(lora_config.layer_replication)
            self.store = ReplicatedStore(self.store, sources)
            config = type(base_config).from_dict(base_config.to_dict())
            replicate_config(config, sources)
        adapter_store = TensorStore([adapter_file(adapter_dir)])
        self.config = _read_config(config, adapter_dir, base, trust_remote_code)
        quantization = base_config.to_dict().get("quantization_config")
        check_base_is_mergeable(quantization, str(base))
        self.stored_4bit = bool(quantization)
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config
        self.model_class = _model_class(self.config, lora_config)
        self._adapt_vocab(self._blank_model(), adapter_store)
        model = self._blank_model()
        self.in_name, self.out_name = _embedding_names(model)
        self.tied = self.out_name is not None and bool(self.config.get_text_config().tie_word_embeddings)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.names = NameMap(model, self._weights())
        self.adapter = Adapter(self._blank_model(), lora_config, adapter_store, loftq_bits)
        # A base that is stored in 4 bits needs no round trip.
        self.trained_on = None if self.stored_4bit else trained_on
        self.rounded = quantized_params(self._blank_model(), self.trained_on) if self.trained_on else set()
        self.fidelity: dict[str, Fidelity] = {}
        self._made: dict[str, torch.Tensor] = {}  # parameters or stored tensors made together with one already written

    # --- what is there ------------------------------------------------------------------------------------------------

    def _blank_model(self) -> PreTrainedModel:
        with torch.device("meta"):
            if self.model_class.__name__.startswith("Auto"):
                return self.model_class.from_config(self.config, trust_remote_code=self.trust_remote_code)
            return self.model_class(self.config)

    def _weights(self) -> list[TensorInfo]:
        infos = list(self.store.tensors.values())
        if not self.stored_4bit:
            return infos
        names = set(self.store.tensors)
        return [info for info in infos if not is_side_tensor(info.name, names)]

    def _adapt_vocab(self, model: PreTrainedModel, adapter_store: TensorStore) -> None:
        """The adapter's own embedding rows say how large the trained vocabulary is."""
        for name in filter(None, _embedding_names(model)):
            path = PEFT_PREFIX + name.removesuffix(".weight")
            for key in (f"{path}.weight", f"{path}.base_layer.weight", f"{path}.token_adapter.base_layer.weight"):
                if key in adapter_store.tensors:
                    self.config.get_text_config().vocab_size = adapter_store.tensors[key].shape[0]

    @property
    def num_base_rows(self) -> int:
        """Rows of the base model's embedding; at most those of the merged one."""
        stored = self.names.stored_of.get(self.in_name)
        num_rows = self.shapes[self.in_name][0]
        return min(self.store.tensors[stored].shape[0], num_rows) if stored else num_rows

    def _stored_name(self, param: str) -> str | None:
        if self.tied and param == self.out_name:
            return self.names.stored_of.get(self.in_name)
        return self.names.stored_of.get(param)

    def dtype_of(self, param: str) -> torch.dtype:
        """The dtype in which a parameter is written."""
        stored = self._stored_name(param)
        if stored is None and param in self.names.group_of_param:
            stored = next(iter(self.names.group_of_param[param].patterns))
        original = self.store.tensors[stored].dtype if stored else torch.float32
        if self.stored_4bit and not original.is_floating_point:
            original = _dtype_of_config(self.config)
        return self.dtype if self.dtype is not None and original.is_floating_point else original

    def _read_base(self, param: str) -> torch.Tensor:
        """A parameter of the base model as it was while the adapter was trained."""
        stored = self._stored_name(param)
        if self.tied and param in (self.in_name, self.out_name):
            # An adapter on one end brings that end's base along, in training's precision, and PEFT loads it for both.
            for end in filter(None, (self.in_name, self.out_name)):
                key = f"{PEFT_PREFIX}{end.removesuffix('.weight')}.base_layer.weight"
                if key in self.adapter.store.tensors:
                    return self.adapter.store.read(key)
        if stored is None and param in self.names.group_of_param:
            return self._read_group(self.names.group_of_param[param])[param]
        if stored is None:
            raise ModelError(f"The base model stores no tensor for `{param}`, which the adapter changes.")
        if self.stored_4bit and not self.store.tensors[stored].dtype.is_floating_point:
            weight = read_stored(stored, set(self.store.tensors), self.store.read)
        else:
            weight = self.store.read(stored)
        if param in self.rounded and self.trained_on:
            weight = self.trained_on.round_trip(weight)
        if param in (self.in_name, self.out_name):
            weight = _grown(weight, self.shapes[param][0])
        return weight

    def _read_group(self, group: Group) -> dict[str, torch.Tensor]:
        return self.names.to_params(group, {name: self.store.read(name) for name in group.patterns})

    # --- what is written ----------------------------------------------------------------------------------------------

    def _make_params(self, change: Change) -> None:
        merged, fidelity = self.adapter.apply(change, self._read_base, self.dtype_of)
        self._made.update(merged)
        if fidelity:
            self.fidelity[change.path] = fidelity

    def _param(self, param: str) -> torch.Tensor:
        if param in self.adapter.changes:
            if param not in self._made:
                self._make_params(self.adapter.changes[param])
            return self._made.pop(param)
        return self._read_base(param).to(self.dtype_of(param))

    def _stored_tensor(self, name: str) -> torch.Tensor:
        """What is written under `name`."""
        if name in self._made:
            return self._made.pop(name)
        group = self.names.group_of_stored.get(name)
        if group and any(param in self.adapter.changes for param in group.params):
            params = {param: self._param(param) for param in group.params}
            self._made.update(self.names.to_stored(group, params))
            return self._made.pop(name)
        param = self.names.param_of.get(name, name)
        if group or (param not in self.shapes):
            tensor = self.store.read(name)
            return tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor
        return self._param(param)

    def _plan(self) -> tuple[list[TensorInfo], bool]:
        """The tensors to write, and whether input and output embedding are no longer one."""
        infos = []
        for info in self._weights():
            param = self.names.param_of.get(info.name)
            change = self.adapter.changes.get(param) if param else None
            shape = info.shape
            if change and param:
                shape = change.shapes[param]
            elif param and (self.stored_4bit or param in (self.in_name, self.out_name)):
                shape = self.shapes[param]
            if param:
                dtype = self.dtype_of(param)
            else:
                dtype = self.dtype if self.dtype and info.dtype.is_floating_point else info.dtype
            infos.append(TensorInfo(info.name, dtype, shape))
        present = {self.names.param_of.get(info.name) for info in infos} | self.names.group_of_param.keys()
        extra = [param for param in self.adapter.changes if param not in present]
        untied = self.tied and self._must_untie()
        if self.tied and not untied:
            extra = [param for param in extra if param != self.out_name]
        elif untied and self.out_name and self.out_name not in present and self.out_name not in extra:
            extra.append(self.out_name)
        for param in extra:
            change = self.adapter.changes.get(param)
            shape = change.shapes[param] if change else self.shapes[param]
            infos.append(TensorInfo(param, self.dtype_of(param), shape))
        return infos, untied

    def _must_untie(self) -> bool:
        """Whether the adapter made the shared embedding two different ones (LoRA on one end of a tied pair)."""
        assert self.out_name is not None
        if not {self.in_name, self.out_name} & self.adapter.changes.keys():
            return False
        return not torch.equal(self._param(self.in_name), self._param(self.out_name))

    def write(self, folder: Path, max_shard_bytes: int) -> MergeReport:
        """Weights, index, config, generation config, tokenizer and the rest of the base folder."""
        infos, untied = self._plan()
        write_model(folder, infos, self._stored_tensor, max_shard_bytes=max_shard_bytes)
        self.store.close()
        copy_side_files(self.base, self.adapter_dir, folder)
        text_config = self.config.get_text_config()
        if untied:
            self.config.tie_word_embeddings = text_config.tie_word_embeddings = False
        self.config.dtype = text_config.dtype = self.dtype_of(self.in_name)
        self.config.save_pretrained(folder)
        copy_generation_config(self.base, self.adapter_dir, folder)
        return MergeReport(
            folder,
            num_tensors=len(infos),
            num_changed=len(self.adapter.changes),
            num_rounded=len(self.rounded - self.adapter.changes.keys()),
            num_bytes=sum(info.num_bytes for info in infos),
            untied=untied,
            fidelity=self.fidelity,
        )


def _read_config(
    config: PretrainedConfig | None, adapter_dir: Path, base: Path, trust_remote_code: bool
) -> PretrainedConfig:
    if config is not None:
        return type(config).from_dict(config.to_dict())
    folder = adapter_dir if (adapter_dir / "config.json").is_file() else base
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _model_class(config: PretrainedConfig, lora_config: LoraConfig) -> Any:
    """The class whose parameter names the adapter's tensors carry."""
    if lora_config.task_type == "SEQ_CLS":
        return transformers.AutoModelForSequenceClassification
    if lora_config.task_type == "TOKEN_CLS":
        return transformers.AutoModelForTokenClassification
    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    return transformers.AutoModelForCausalLM


def _embedding_names(model: PreTrainedModel) -> tuple[str, str | None]:
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    return f"{names[id(embeddings)]}.weight", None if head is None else f"{names[id(head)]}.weight"


def _dtype_of_config(config: PretrainedConfig) -> torch.dtype:
    dtype = config.get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _grown(weight: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Embedding rows that training added but did not save: they were never trained; the mean row stands in for them."""
    missing = num_rows - weight.shape[0]
    if missing <= 0:
        return weight[:num_rows]
    LOG.warning_once(
        f"training used {num_rows} embedding rows, the base model has {weight.shape[0]}, and the adapter does not hold "
        f"the {missing} new ones: they are filled with the mean row. To train them, set "
        "`lora_modules_to_save: [embed_tokens, lm_head]`."
    )
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])
