"""`ModelLoader`: from a config to a model that is ready to train or to answer.

The order is that of `ModelLoader.load`; plugins are asked at the same points as the ledger of patches.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftConfig, PeftModel, prepare_model_for_kbit_training
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from axolotl.exceptions import AxolotlError, ConfigError, ModelError
from axolotl.integrations.base import PluginManager
from axolotl.loaders import quantization
from axolotl.loaders.adapter import cast_for_half_precision_attention, freeze_base, load_adapter
from axolotl.loaders.constants import DEFAULT_AUTO_MODEL, MULTIMODAL_AUTO_MODEL
from axolotl.loaders.data_starts import DataStart
from axolotl.loaders.patch_manager import PatchManager
from axolotl.loaders.utils import (
    LORA_ADAPTERS,
    ensure_dtype,
    explain_load_error,
    find_class,
    get_linear_embedding_layers,
    load_model_config,
    read_base_model,
    read_revision,
    read_seed,
)
from axolotl.monkeypatch.attention.table import check_packing, resolve_attention
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.freeze import freeze_layers_except
from axolotl.utils.logging import get_logger
from axolotl.utils.tokenization import embedding_rows

LOG = get_logger(__name__)

# Preference trainers put the adapter on themselves, so that the plain model can serve as the reference.
_TRAINER_ADAPTS = ("dpo", "ipo", "kto")


def read_dtype(cfg: DictDefault, *, inference: bool = False) -> torch.dtype:
    """The dtype that weights are loaded in: `torch_dtype`, but float32 for weights that train under a loss scaler."""
    dtype = _resolved_dtype(cfg)
    frozen = cfg.adapter or cfg.load_in_8bit or cfg.load_in_4bit
    if inference or frozen or not cfg.fp16 or dtype != torch.float16:
        return dtype
    note_choice(
        cfg, "torch_dtype", "float32", "`fp16: true` scales the loss; gradients of float16 weights cannot be unscaled"
    )
    return torch.float32


def _resolved_dtype(cfg: DictDefault) -> torch.dtype:
    if isinstance(cfg.torch_dtype, torch.dtype):
        return cfg.torch_dtype
    if isinstance(cfg.torch_dtype, str):
        return getattr(torch, cfg.torch_dtype.removeprefix("torch."))
    if cfg.bf16 is True or cfg.bf16 == "full" or cfg.bfloat16:
        return torch.bfloat16
    if cfg.load_in_8bit or cfg.fp16 or cfg.float16:
        return torch.float16
    return torch.float32


def read_model_class(cfg: DictDefault, config: PretrainedConfig) -> tuple[Any, type[PreTrainedModel] | None]:
    """The class that `type_of_model` names, and the model class it will build (None when that is remote code).

    Raises:
        ConfigError: transformers has no such class.
    """
    default = MULTIMODAL_AUTO_MODEL if cfg.is_multimodal else DEFAULT_AUTO_MODEL
    name = cfg.type_of_model or default
    loader = find_class("type_of_model", name, default)
    if isinstance(loader, type) and issubclass(loader, PreTrainedModel):
        return loader, loader
    if cfg.trust_remote_code and getattr(config, "auto_map", None):
        return loader, None
    mapping = loader._model_mapping
    if type(config) not in mapping:
        raise ModelError(
            f"`base_model: {cfg.base_model}` is a {config.model_type} model, which `type_of_model: {name}` cannot build. "
            "Write the auto class or the class of transformers that fits the model."
        )
    built = mapping[type(config)]
    return loader, built[0] if isinstance(built, (list, tuple)) else built


class ModelLoader:
    """Loads a model and, when the config asks for one, its adapter.

    Attributes:
        cfg: the resolved config.
        tokenizer: the tokenizer; its size and its special tokens decide those of the model.
        inference: load to answer: nothing is prepared for training, adapters are frozen, the cache is on.
        reference_model: load the plain model that a preference trainer compares with; no adapter.
        data_start: what the adapter starts from, with a `peft_init_lora_weights` that looks at rows.
        model_config: the model's config.
        dtype: dtype of the weights.
        model: the model, once built.
    """

    def __init__(
        self,
        cfg: DictDefault,
        tokenizer: PreTrainedTokenizerBase,
        *,
        inference: bool = False,
        reference_model: bool = False,
        data_start: DataStart | None = None,
        **kwargs: Any,
    ):
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.inference = inference
        self.reference_model = reference_model
        self.data_start = data_start
        self.kwargs = kwargs
        self.model_config = load_model_config(cfg)
        self.dtype = read_dtype(cfg, inference=inference)
        self.patch_manager = PatchManager(cfg, self.model_config, inference)
        self.model: PreTrainedModel | PeftModel
        self.attn_implementation: str | None = None

    def load(self) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
        """Load and prepare the model.

        Returns:
            The model, and the PEFT config or None. With `rl: dpo | ipo | kto` and a new adapter the model comes without
            it: the trainer puts it on.

        Raises:
            ModelError: the weights are missing or do not fit.
            ConfigError: the config contradicts the model.
        """
        plugins = PluginManager.get_instance()
        self.patch_manager.apply_pre_model_load_patches()
        plugins.pre_model_load(self.cfg)
        self.patch_manager.apply_post_plugin_pre_model_load_patches()

        self.model = self._build()
        plugins.post_model_build(self.cfg, self.model)
        self.patch_manager.apply_post_model_build_patches(self.model)

        self._fit_to_tokenizer()
        self._fit_to_sequence_len()
        if self.inference:
            self.model.config.use_cache = True
        else:
            self._prepare_for_training()

        plugins.pre_lora_load(self.cfg, self.model)
        peft_config = self._load_adapters()
        plugins.post_lora_load(self.cfg, self.model)
        if self.cfg.adapter and self._is_sharded:
            # FSDP flattens parameters together and needs one dtype.
            ensure_dtype(self.model, self.dtype)
        self.patch_manager.apply_post_model_load_patches(self.model)
        plugins.post_model_load(self.cfg, self.model)
        self._check_something_trains()
        return self.model, peft_config

    # --- building -----------------------------------------------------------------------------------------------------

    @property
    def _is_sharded(self) -> bool:
        return bool(self.cfg.fsdp or self.cfg.fsdp_config)

    def _build(self) -> PreTrainedModel:
        """The model from disk or hub, or from its config alone with `reinit_weights`."""
        loader, model_class = read_model_class(self.cfg, self.model_config)
        check_packing(self.cfg, self.model_config)
        self.attn_implementation = resolve_attention(self.cfg, self.model_config, model_class, inference=self.inference)
        if self.cfg.reinit_weights and not self.reference_model:
            return self._build_random(loader)
        base_model = read_base_model(self.cfg)
        keywords = self._read_model_kwargs(base_model)
        try:
            model, report = loader.from_pretrained(base_model, output_loading_info=True, **keywords)
        except torch.OutOfMemoryError:
            raise
        except TypeError as error:
            if not self.cfg.overrides_of_model_kwargs:
                raise
            raise ConfigError(
                f"`overrides_of_model_kwargs: {dict(self.cfg.overrides_of_model_kwargs)}` has an argument that the model does not "
                f"take: {error}."
            ) from error
        except AxolotlError:
            raise
        except ImportError as error:
            key = "attn_implementation" if "/" in str(self.attn_implementation) else "base_model"
            value = self.attn_implementation if key == "attn_implementation" else base_model
            raise ModelError(f"`{key}: {value}` needs a package that is not installed: {error}") from error
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            if self.cfg.overrides_of_model_config and "mismatched_sizes" in str(error):
                raise ConfigError(
                    f"`overrides_of_model_config: {dict(self.cfg.overrides_of_model_config)}` makes weights of other shapes than "
                    f"those of `base_model: {base_model}`. Remove it, or write `reinit_weights: true` to start from random weights."
                ) from error
            if self.cfg.overrides_of_model_config and isinstance(error, KeyError):
                raise ConfigError(
                    f"`overrides_of_model_config: {self.cfg.overrides_of_model_config.to_dict()}` asks for {error}, which this version of "
                    "transformers does not know."
                ) from error
            raise explain_load_error(base_model, "base_model", error) from error
        quantization.keep_4bit_layout(model)
        missing = sorted(report["missing_keys"])
        if missing:
            names = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
            LOG.warning(
                f"`base_model: {self.cfg.base_model}` lacks {len(missing)} weights, which start at random: {names}"
            )
            note_choice(self.cfg, "base_model", f"{len(missing)} weights start at random", f"its files lack {names}")
        return model

    def _build_random(self, loader: Any) -> PreTrainedModel:
        """Random weights from the model's config, the same for the same `seed` on every rank."""
        seed = read_seed(self.cfg)
        is_auto = hasattr(loader, "from_config")
        build = loader.from_config if is_auto else loader._from_config
        keywords = {"trust_remote_code": True} if is_auto and self.cfg.trust_remote_code else {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build(
                self.model_config,
                dtype=self.dtype,
                attn_implementation=self.attn_implementation,
                **keywords,
            )
        note_choice(self.cfg, "base_model", "random weights", f"`reinit_weights: true`, seed {seed}")
        return model if self._is_sharded or self.cfg.deepspeed else model.to(self._device)

    @property
    def _device(self) -> torch.device:
        if self.cfg.device:
            return torch.device(self.cfg.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _read_model_kwargs(self, base_model: str) -> dict[str, Any]:
        """Keywords of `from_pretrained`."""
        cfg = self.cfg
        keywords: dict[str, Any] = {
            "config": self.model_config,
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": True if cfg.trust_remote_code else None,
            "revision": read_revision(cfg, base_model),
            "use_kernels": cfg.use_kernels,
            "experts_implementation": cfg.experts_implementation,
            "quantization_config": quantization.read_quantization_config(cfg, self.model_config, self.dtype),
            **self._read_placement(),
            **self.kwargs,
            **self._read_written_kwargs(),
        }
        return {name: value for name, value in keywords.items() if value is not None}

    def _read_written_kwargs(self) -> dict[str, Any]:
        """`overrides_of_model_kwargs`. What is a field of the model's config, such as `use_cache`, is set there instead."""
        written = dict(self.cfg.overrides_of_model_kwargs or {})
        if "torch_dtype" in written:
            written["dtype"] = written.pop("torch_dtype")
        own = inspect.signature(PreTrainedModel.from_pretrained).parameters
        for name in [name for name in written if name in self.model_config.to_dict() and name not in (*own, "dtype")]:
            setattr(self.model_config, name, written.pop(name))
        return written

    def _read_placement(self) -> dict[str, Any]:
        """`device_map` and `max_memory`: where weights go while they are loaded."""
        cfg = self.cfg
        if self._is_sharded or cfg.deepspeed:
            return {}
        max_memory = dict(cfg.max_memory.items()) if cfg.max_memory else None
        if cfg.gpu_memory_limit:
            limit = cfg.gpu_memory_limit
            limit = limit if isinstance(limit, str) and not limit.isdigit() else f"{limit}GiB"
            max_memory = dict.fromkeys(range(torch.cuda.device_count()), limit)
            max_memory["cpu"] = "256GiB"
        if max_memory and (cfg.world_size or 1) > 1:
            reason = "each process keeps the whole model on its own GPU"
            note_choice(cfg, "max_memory" if cfg.max_memory else "gpu_memory_limit", None, reason)
        elif max_memory:
            # One entry for everything is what the program fills in; it would leave nothing to distribute.
            written = cfg.device_map if isinstance(cfg.device_map, str) or len(cfg.device_map or ()) > 1 else None
            return {"device_map": written or "auto", "max_memory": max_memory}
        if cfg.device_map == "auto" and torch.cuda.device_count() <= 1:
            # With one device "auto" could only move layers to the CPU, unasked, when the model does not fit.
            return {"device_map": {"": str(self._device)}} if self._device.type == "cuda" else {}
        if cfg.device_map is None and (cfg.load_in_4bit or cfg.load_in_8bit) and self._device.type == "cuda":
            return {"device_map": {"": self._device}}
        return {"device_map": cfg.device_map}

    # --- fitting ------------------------------------------------------------------------------------------------------

    def _fit_to_tokenizer(self) -> None:
        """Grow (or, with `shrink_embeddings`, cut) the embeddings to the tokenizer, and copy its end tokens."""
        model, cfg, tokenizer = self.model, self.cfg, self.tokenizer
        embedding: Any = model.get_input_embeddings()
        present = embedding.weight.shape[0]
        to_32x, shrinks = bool(cfg.resize_token_embeddings_to_32x), bool(cfg.shrink_embeddings)
        rows = embedding_rows(present, len(tokenizer), to_32x=to_32x, shrinks=shrinks)
        if rows != present:
            model.resize_token_embeddings(rows, mean_resizing=bool(cfg.mean_resizing_embeddings))
            note_choice(
                cfg, "embedding rows", rows, f"the model had {present}, the tokenizer has {len(tokenizer)} tokens"
            )
        else:
            model.tie_weights()
        for name in ("bos_token_id", "eos_token_id"):
            ours, theirs = getattr(tokenizer, name), getattr(model.config, name, None)
            if ours is None or theirs is None or ours == theirs or (isinstance(theirs, list) and ours in theirs):
                continue
            setattr(model.config, name, ours)
            generation = getattr(model, "generation_config", None)
            if generation is not None:
                setattr(generation, name, ours)

    def _fit_to_sequence_len(self) -> None:
        """Raise `max_position_embeddings` to `sequence_len`.

        Raises:
            ConfigError: positions are learnt, so that the table of the model ends the sequence.
        """
        config = self.model.config.get_text_config()
        limit, wanted = getattr(config, "max_position_embeddings", None), self.cfg.sequence_len
        if not limit or not wanted or wanted <= limit:
            return
        for name, module in self.model.named_modules():
            learnt = isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in (
                "wpe",
                "embed_positions",
                "position_embeddings",
            )
            if learnt and module.num_embeddings < wanted:
                raise ConfigError(
                    f"`sequence_len: {wanted}` is longer than the {limit} positions that `base_model: {self.cfg.base_model}` has "
                    f"learnt. Write `sequence_len: {limit}` or less."
                )
        config.max_position_embeddings = wanted
        note_choice(
            self.cfg, "max_position_embeddings", wanted, f"the model was made for {limit}, `sequence_len` is longer"
        )

    # --- training -----------------------------------------------------------------------------------------------------

    def _prepare_for_training(self) -> None:
        model, cfg = self.model, self.cfg
        model.config.use_cache = False
        if cfg.unfrozen_parameters and not self.reference_model:
            freeze_layers_except(model, list(cfg.unfrozen_parameters))
        if cfg.adapter is None or self.reference_model:
            return
        if quantization.is_quantized(model):
            # Checkpointing is switched on by the trainer, with the kwargs of the run.
            prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            if cfg.embeddings_skip_upcast or self._attends_in_half or cfg.cut_cross_entropy:
                embeddings = get_linear_embedding_layers(self.model_config.model_type)
                cast_for_half_precision_attention(model, self.dtype, embeddings)
        else:
            freeze_base(model)

    @property
    def _attends_in_half(self) -> bool:
        return self.attn_implementation not in (None, "eager", "sdpa")

    def _load_adapters(self) -> PeftConfig | None:
        cfg = self.cfg
        if self.reference_model or cfg.adapter is None:
            return None
        trainer_adapts = cfg.rl in _TRAINER_ADAPTS and not (cfg.merge_lora or self.inference or cfg.lora_model_dir)
        if trainer_adapts and cfg.adapter in LORA_ADAPTERS:
            _, peft_config = load_adapter(self.model, cfg, cfg.adapter, config_only=True)
            return peft_config
        start = None if self.inference else self.data_start
        if start and start.rows is not None:
            self._move_to_device()
        self.model, peft_config = load_adapter(self.model, cfg, cfg.adapter, inference=self.inference, data_start=start)
        return peft_config

    def _move_to_device(self) -> None:
        """What the trainer would do later: rows go through the model before there is one."""
        spread = "hf_device_map" in vars(self.model)
        if not (spread or quantization.is_quantized(self.model) or self.cfg.layer_offloading):
            self.model.to(self._device)  # pyright: ignore[reportArgumentType]

    def _check_something_trains(self) -> None:
        if (
            self.inference
            or self.reference_model
            or self.cfg.merge_lora
            or (self.cfg.rl in _TRAINER_ADAPTS and self.cfg.adapter)
        ):
            return
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ModelError(
                "No parameter of the model is trainable: check `unfrozen_parameters` and `lora_target_modules`."
            )
