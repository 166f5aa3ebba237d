"""`merge_adapter`: base model + LoRA adapter -> a model folder, tensor by tensor."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from peft import LoraConfig
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from axolotl.exceptions import ModelError, OutputError
from axolotl.loaders.adapter_base import check_fits_base
from axolotl.utils.logging import get_logger
from axolotl.utils.merge.adapter import PEFT_PREFIX, Adapter, Change, Fidelity, load_lora_config
from axolotl.utils.merge.four_bit import (
    EightBit,
    FourBit,
    check_base_is_mergeable,
    is_side_tensor,
    quantized_params,
    read_stored,
)
from axolotl.utils.merge.names import Group, NameMap
from axolotl.utils.merge.proof import LogitProof, compare_logits, dtype_that_fits
from axolotl.utils.merge.replication import ReplicatedStore, list_sources, replicate_config
from axolotl.utils.merge.tensors import (
    TensorInfo,
    TensorStore,
    adapter_file,
    model_files,
    parse_size,
    write_model,
)

LOG = get_logger(__name__)

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.index.json")
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "additional_chat_templates", "*.model", "*.tiktoken", "tekken.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
# Largest accepted relative error of one merged layer's output: the rounding of the written weight.
LAYER_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class MergeReport:
    """What was merged and how exactly.

    Args:
        num_changed: parameters that the adapter changed.
        num_rounded: frozen weights written as the round trip of their quantization.
        fidelity: parameter name -> how near its merged layer is to the unmerged one.
        logits: the comparison of whole models, or None with the reason in `logits_skipped`.
    """

    output_dir: Path
    num_tensors: int = 0
    num_changed: int = 0
    num_rounded: int = 0
    num_bytes: int = 0
    untied: bool = False
    fidelity: dict[str, Fidelity] = field(default_factory=dict)
    logits: LogitProof | None = None
    logits_skipped: str = ""

    @property
    def worst_layer(self) -> tuple[str, float]:
        if not self.fidelity:
            return "", 0.0
        name = max(self.fidelity, key=lambda key: self.fidelity[key].output_error)
        return name, self.fidelity[name].output_error

    @property
    def mean_lost(self) -> float:
        return sum(layer.lost for layer in self.fidelity.values()) / max(len(self.fidelity), 1)

    def lines(self) -> list[str]:
        """The report for the terminal."""
        text = [
            f"{self.num_changed} of {self.num_tensors} tensors changed by the adapter, {self.num_bytes / 2**30:.2f} GiB "
            f"written to {self.output_dir}"
        ]
        if self.num_rounded:
            text.append(f"{self.num_rounded} weights written as the quantized base that the adapter was trained on")
        if self.untied:
            text.append("input and output embeddings now differ: written as two tensors, tie_word_embeddings: false")
        if self.fidelity:
            text.append(
                f"every merged layer reproduces base + adapter on random inputs within {self.worst_layer[1]:.1e} (worst: "
                f"{self.worst_layer[0]}); rounding takes {self.mean_lost:.1%} of the adapter's change"
            )
        text.append(str(self.logits) if self.logits else f"whole-model logits not compared: {self.logits_skipped}")
        return text


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
    base, adapter, output = _local_base(str(base_dir), revision), Path(adapter_dir), Path(output_dir)
    lora_config, loftq_bits = load_lora_config(adapter)
    if output.resolve() in (base.resolve(), adapter.resolve()):
        raise OutputError(f"`{output}` is the folder of the base model or the adapter: a merge must not overwrite it.")
    rounding = None if dequantize else trained_on
    merge = _Merge(base, adapter, lora_config, config, dtype, rounding, trust_remote_code, loftq_bits, str(base_dir))
    aside = _fresh_folder(output, "partial")
    report = MergeReport(output)
    try:
        merge.write(aside, report, parse_size(max_shard_size))
        merge.check_layers(report)
        if prove:
            merge.prove(aside, report)
        else:
            report.logits_skipped = "not asked for"
        _put_in_place(aside, output)
    except ModelError:
        if any(aside.glob("*.safetensors")):
            kept = _fresh_folder(output, "mismatch")
            os.replace(aside, kept)
            LOG.error(f"what was written is kept in {kept}")
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


class _Merge:
    """One merge: what each written tensor is made of."""

    def __init__(
        self,
        base: Path,
        adapter_dir: Path,
        lora_config: LoraConfig,
        config: PretrainedConfig | None,
        dtype: torch.dtype | None,
        trained_on: FourBit | EightBit | None,
        trust_remote_code: bool,
        loftq_bits: int | None,
        base_name: str,
    ):
        self.base, self.adapter_dir, self.dtype, self.trained_on = base, adapter_dir, dtype, trained_on
        self.trust_remote_code = trust_remote_code
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
        check_base_is_mergeable(base_config.to_dict().get("quantization_config"), str(base))
        self.stored_4bit = bool(base_config.to_dict().get("quantization_config"))
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config
        self.model_class = _model_class(self.config, lora_config)
        model = self._blank_model()
        self._adapt_vocab(model, adapter_store)
        model = self._blank_model()
        self.in_name, self.out_name = _embedding_names(model)
        self.tied = self.out_name is not None and bool(self.config.get_text_config().tie_word_embeddings)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.names = NameMap(model, self._weights())
        self.adapter = Adapter(self._blank_model(), lora_config, adapter_store, loftq_bits)
        rounds = trained_on is not None and not self.stored_4bit
        self.rounded = quantized_params(self._blank_model(), trained_on) if rounds else set()
        self.fidelity: dict[str, Fidelity] = {}
        self._made: dict[str, torch.Tensor] = {}  # parameters or stored tensors made together with one already written

    # what is there

    def _blank_model(self) -> PreTrainedModel:
        with torch.device("meta"):
            if self.model_class.__name__.startswith("Auto"):
                return self.model_class.from_config(self.config, trust_remote_code=self.trust_remote_code)
            return self.model_class(self.config)

    def _weights(self) -> list[TensorInfo]:
        names = self.store.tensors.keys()
        return [
            info
            for info in self.store.tensors.values()
            if not (self.stored_4bit and is_side_tensor(info.name, set(names)))
        ]

    def _adapt_vocab(self, model: PreTrainedModel, adapter_store: TensorStore) -> None:
        """The adapter's own embedding rows say how large the trained vocabulary is."""
        for name in filter(None, _embedding_names(model)):
            path = PEFT_PREFIX + name.removesuffix(".weight")
            for key in (f"{path}.weight", f"{path}.base_layer.weight", f"{path}.token_adapter.base_layer.weight"):
                if key in adapter_store.tensors:
                    self.config.get_text_config().vocab_size = adapter_store.tensors[key].shape[0]

    def _stored_name(self, param: str) -> str | None:
        if self.tied and param == self.out_name:
            return self.names.stored_of.get(self.in_name)
        return self.names.stored_of.get(param)

    def _dtype_of(self, param: str) -> torch.dtype:
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

    # what is written

    def _make_params(self, change: Change) -> None:
        merged, fidelity = self.adapter.apply(change, self._read_base, self._dtype_of)
        self._made.update(merged)
        if fidelity:
            self.fidelity[change.path] = fidelity

    def _param(self, param: str) -> torch.Tensor:
        if param in self.adapter.changes:
            if param not in self._made:
                self._make_params(self.adapter.changes[param])
            return self._made.pop(param)
        return self._read_base(param).to(self._dtype_of(param))

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

    def _plan(self, report: MergeReport) -> list[TensorInfo]:
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
                dtype = self._dtype_of(param)
            else:
                dtype = self.dtype if self.dtype and info.dtype.is_floating_point else info.dtype
            infos.append(TensorInfo(info.name, dtype, shape))
        report.num_changed = len(self.adapter.changes)
        report.num_rounded = len(self.rounded - self.adapter.changes.keys())
        present = {self.names.param_of.get(info.name) for info in infos} | self.names.group_of_param.keys()
        extra = [param for param in self.adapter.changes if param not in present]
        if self.tied and self.out_name:
            report.untied = self._must_untie()
            if not report.untied:
                extra = [param for param in extra if param != self.out_name]
            elif self.out_name not in present and self.out_name not in extra:
                extra.append(self.out_name)
        for param in extra:
            change = self.adapter.changes.get(param)
            shape = change.shapes[param] if change else self.shapes[param]
            infos.append(TensorInfo(param, self._dtype_of(param), shape))
        return infos

    def _must_untie(self) -> bool:
        """Whether the adapter made the shared embedding two different ones (LoRA on one end of a tied pair)."""
        assert self.out_name is not None
        if not {self.in_name, self.out_name} & self.adapter.changes.keys():
            return False
        return not torch.equal(self._param(self.in_name), self._param(self.out_name))

    def write(self, folder: Path, report: MergeReport, max_shard_bytes: int) -> None:
        """Weights, index, config, generation config, tokenizer and the rest of the base folder."""
        infos = self._plan(report)
        write_model(folder, infos, self._stored_tensor, max_shard_bytes=max_shard_bytes)
        self.store.close()
        report.num_tensors, report.num_bytes = len(infos), sum(info.num_bytes for info in infos)
        report.fidelity = self.fidelity
        _copy_side_files(self.base, self.adapter_dir, folder)
        text_config = self.config.get_text_config()
        if report.untied:
            self.config.tie_word_embeddings = text_config.tie_word_embeddings = False
        self.config.dtype = text_config.dtype = self._dtype_of(self.in_name)
        self.config.save_pretrained(folder)
        _copy_generation_config(self.base, self.adapter_dir, folder)

    # what it is worth

    def check_layers(self, report: MergeReport) -> None:
        for path, layer in report.fidelity.items():
            tolerance = LAYER_TOLERANCES.get(self._dtype_of(f"{path}.weight"), 1e-5)
            if layer.output_error > tolerance:
                raise ModelError(
                    f"The merged `{path}` differs from base + adapter by {layer.output_error:.1e} (accepted {tolerance:.0e})."
                )
        if report.mean_lost > 0.3:
            LOG.warning(
                f"rounding to {self._dtype_of(self.in_name)} takes {report.mean_lost:.0%} of what the adapter changed: the "
                "adapter is small against the weights' precision. Merge with `dtype` float32, or keep the adapter."
            )

    def prove(self, folder: Path, report: MergeReport) -> None:
        num_params = report.num_bytes // max(self._dtype_of(self.in_name).itemsize, 1)
        dtype = dtype_that_fits(num_params, self._dtype_of(self.in_name))
        if dtype is None:
            report.logits_skipped = "free memory does not hold the model; each layer was compared by itself"
            return
        stored_in = self.names.stored_of.get(self.in_name)
        num_base_rows = self.store.tensors[stored_in].shape[0] if stored_in else self.shapes[self.in_name][0]
        report.logits = compare_logits(
            self.model_class,
            self.base,
            self.adapter_dir,
            folder,
            config=self.config,
            num_base_rows=min(num_base_rows, self.shapes[self.in_name][0]),
            dtype=dtype,
            written=self._dtype_of(self.in_name),
            trained_on=self.trained_on if not self.stored_4bit else None,
            rounded=self.rounded,
            trust_remote_code=self.trust_remote_code,
        )
        if not report.logits.holds:
            raise ModelError(f"The merged model does not answer as base + adapter do: {report.logits}.")


def _local_base(base: str, revision: str | None) -> Path:
    if Path(base).is_dir():
        return Path(base)
    if Path(base).is_absolute() or base.startswith("."):
        raise ModelError(f"`base_model: {base}` is not a folder.")
    ignore = ["*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.pth", "original/*"]
    return Path(snapshot_download(base, revision=revision, ignore_patterns=ignore))


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


def _copy_side_files(base: Path, adapter: Path, folder: Path) -> None:
    """Everything of the base but its weights and page, then the tokenizer that training saved."""
    skipped = shutil.ignore_patterns(*WEIGHTS, "README*", "*.md", ".*", "adapter_*", "original")
    shutil.copytree(base, folder, ignore=skipped, dirs_exist_ok=True)
    if not any(adapter.glob("tokenizer*")):
        return
    for pattern in TOKENIZER_FILES:
        for old in folder.glob(pattern):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        for new in adapter.glob(pattern):
            if new.is_dir():
                shutil.copytree(new, folder / new.name)
            elif new.suffix != ".bin":
                shutil.copy2(new, folder / new.name)


def _copy_generation_config(base: Path, adapter: Path, folder: Path) -> None:
    for source in (adapter, base):
        if (source / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(source)  # unreadable ones fail here and not at the first answer
            shutil.copy2(source / "generation_config.json", folder / "generation_config.json")
            return


def _fresh_folder(output: Path, suffix: str) -> Path:
    """An empty folder beside `output`, so that a rename puts it in place."""
    folder = output.with_name(f"{output.name}.{suffix}")
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"`{folder}` cannot be written: {error.strerror}. Choose another `output_dir`.") from error
    return folder


def _put_in_place(aside: Path, output: Path) -> None:
    """Replace `output` by `aside`; whoever looks finds the old folder or the new one, whole."""
    old = output.with_name(f"{output.name}.old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(output, old)
    os.replace(aside, output)
    shutil.rmtree(old, ignore_errors=True)
