"""Optimizers by name: one row each, and how `optimizer` and `optim_args` become a class and its arguments.

To add one: a row. `path` is imported when the optimizer is used, never before. `options` reads and checks `optim_args`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

import torch
from transformers.training_args import OptimizerNames

from axolotl.exceptions import ConfigError, MissingExtraError, did_you_mean
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.optimizers.options import CHOICES, check_options, options_of, read_optim_args

DEFAULT = "adamw_torch_fused"
# Spellings of older configs.
RENAMED = {"adamw_hf": "adamw_torch", "ao_adamw_4bit": "adamw_torch_4bit", "ao_adamw_8bit": "adamw_torch_8bit"}

ADAM = ("lr", "weight_decay", "betas", "eps")
PLAIN = ("lr", "weight_decay")
FACTORIES = {
    "matrix": "axolotl.utils.optimizers.matrix:MatrixFactory",
    "adamc": "axolotl.utils.optimizers.adamc:AdamCFactory",
    "galore": "axolotl.utils.optimizers.galore:ProjectionFactory",
    "apollo": "axolotl.utils.optimizers.galore:ProjectionFactory",
    "lomo": "axolotl.utils.optimizers.libraries:LomoFactory",
}
GALORE = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
Q_GALORE_KEYS = (
    "qgalore_rank",
    "qgalore_update_proj_gap",
    "qgalore_scale",
    "qgalore_proj_type",
    "qgalore_proj_bits",
    "qgalore_proj_group_size",
    "qgalore_cos_threshold",
    "qgalore_gamma_proj",
    "qgalore_queue_size",
)
APOLLO = {
    "rank": 128,
    "proj": "random",
    "scale_type": "channel",
    "update_proj_gap": 200,
    "scale": 1.0,
    "proj_type": "std",
}


@dataclass(frozen=True)
class Row:
    """How one name becomes an optimizer.

    Args:
        path: `module:Class`.
        extra: extra of this package that installs it; empty for what is always there.
        settings: which keys of the config it takes, by the names of its arguments; `betas3` and `eps2` are CAME's.
        fixed: further arguments; `optim_args` may change those that are options of the class.
        via: key of `FACTORIES` when it is not simply called with param groups.
        projection: options for the groups of `optim_target_modules`, with their defaults.
        layerwise: updates happen in the backward pass.
        install: how to get it, where no extra can.
        wrap: `module:function` that mends the class.
    """

    path: str
    extra: str = ""
    settings: tuple[str, ...] = ADAM
    fixed: Mapping[str, Any] = field(default_factory=dict)
    via: str = ""
    projection: Mapping[str, Any] = field(default_factory=dict)
    layerwise: bool = False
    install: str = ""
    wrap: str = ""


def _bnb(cls: str, bits: int, *, paged: bool | None = False, settings: tuple[str, ...] = ADAM) -> Row:
    fixed = {"optim_bits": bits} if paged is None else {"optim_bits": bits, "is_paged": paged}
    return Row(f"bitsandbytes.optim:{cls}", "bitsandbytes", settings, fixed)


def _galore(path: str, *, layerwise: bool, extra: str = "", **more: Any) -> Row:
    return Row(path, extra, via="galore", projection=GALORE, layerwise=layerwise, **more)


def _apollo(*, layerwise: bool) -> Row:
    return Row("apollo_torch:APOLLOAdamW", "apollo", via="apollo", projection=APOLLO, layerwise=layerwise)


def _schedule_free(cls: str, settings: tuple[str, ...]) -> Row:
    wrap = "axolotl.utils.optimizers.libraries:keeps_training_point"
    return Row(f"schedulefree:{cls}", "optimizers", settings, wrap=wrap)


def _flash(cls: str, settings: tuple[str, ...]) -> Row:
    return Row(f"flashoptim:{cls}", "optimizers", settings)


LION = ("lr", "weight_decay", "betas")
ADEMAMIX = ("lr", "weight_decay", "betas3", "eps")
ADAFACTOR = {"scale_parameter": False, "relative_step": False}
ADAFACTOR_PATH = "transformers.optimization:Adafactor"
BNB_8BIT = {"optim_bits": 8, "is_paged": False}

OPTIMIZERS: dict[str, Row] = {
    "adamw_torch": Row("torch.optim:AdamW"),
    "adamw_torch_fused": Row("torch.optim:AdamW", fixed={"fused": True}),
    "sgd": Row("torch.optim:SGD", settings=PLAIN),
    "adagrad": Row("torch.optim:Adagrad", settings=PLAIN),
    "rmsprop": Row("torch.optim:RMSprop", settings=PLAIN),
    "adafactor": Row(ADAFACTOR_PATH, settings=PLAIN, fixed=ADAFACTOR),
    "adamw_bnb_8bit": _bnb("AdamW", 8),
    "adamw_8bit": _bnb("AdamW", 8),
    "paged_adamw_32bit": _bnb("AdamW", 32, paged=True),
    "paged_adamw_8bit": _bnb("AdamW", 8, paged=True),
    "lion_32bit": _bnb("Lion", 32, settings=LION),
    "lion_8bit": _bnb("Lion", 8, settings=LION),
    "paged_lion_32bit": _bnb("Lion", 32, paged=True, settings=LION),
    "paged_lion_8bit": _bnb("Lion", 8, paged=True, settings=LION),
    "ademamix": _bnb("AdEMAMix", 32, settings=ADEMAMIX),
    "ademamix_8bit": _bnb("AdEMAMix", 8, settings=ADEMAMIX),
    "paged_ademamix_32bit": _bnb("AdEMAMix", 32, paged=True, settings=ADEMAMIX),
    "paged_ademamix_8bit": _bnb("AdEMAMix", 8, paged=True, settings=ADEMAMIX),
    "rmsprop_bnb": _bnb("RMSprop", 32, paged=None, settings=PLAIN),
    "rmsprop_bnb_8bit": _bnb("RMSprop", 8, paged=None, settings=PLAIN),
    "rmsprop_bnb_32bit": _bnb("RMSprop", 32, paged=None, settings=PLAIN),
    "adamw_torch_8bit": Row("torchao.optim:AdamW8bit", "torchao", fixed={"block_size": 256}),
    "adamw_torch_4bit": Row("torchao.optim:AdamW4bit", "torchao", fixed={"block_size": 256}),
    "ao_adamw_fp8": Row("torchao.optim:AdamWFp8", "torchao"),
    "schedule_free_adamw": _schedule_free("AdamWScheduleFree", (*ADAM, "warmup_steps")),
    "schedule_free_radam": _schedule_free("RAdamScheduleFree", ADAM),
    "schedule_free_sgd": _schedule_free("SGDScheduleFree", (*PLAIN, "warmup_steps")),
    "galore_adamw": _galore("torch.optim:AdamW", layerwise=False),
    "galore_adamw_8bit": _galore("bitsandbytes.optim:AdamW", layerwise=False, extra="bitsandbytes", fixed=BNB_8BIT),
    "galore_adafactor": _galore(ADAFACTOR_PATH, layerwise=False, settings=PLAIN, fixed=ADAFACTOR),
    "galore_adamw_layerwise": _galore("torch.optim:AdamW", layerwise=True),
    "galore_adamw_8bit_layerwise": _galore(
        "bitsandbytes.optim:AdamW", layerwise=True, extra="bitsandbytes", fixed=BNB_8BIT
    ),
    "galore_adafactor_layerwise": _galore(ADAFACTOR_PATH, layerwise=True, settings=PLAIN, fixed=ADAFACTOR),
    "q_galore_adamw8bit": Row("bitsandbytes.optim:AdamW", "bitsandbytes", fixed=BNB_8BIT, via="galore"),
    "apollo_adamw": _apollo(layerwise=False),
    "apollo_adamw_layerwise": _apollo(layerwise=True),
    "lomo": Row("lomo_optim:Lomo", "optimizers", PLAIN, via="lomo"),
    "adalomo": Row("lomo_optim:AdaLomo", "optimizers", PLAIN, via="lomo"),
    "grokadamw": Row("grokadamw:GrokAdamW", "optimizers", wrap="axolotl.utils.optimizers.libraries:saves_group_state"),
    "stable_adamw": Row("optimi:StableAdamW", "optimizers"),
    "optimi_adamw": Row("optimi:AdamW", "optimizers", fixed={"foreach": False}),
    "came_pytorch": Row("came_pytorch:CAME", "optimizers", ("lr", "weight_decay", "betas3", "eps2")),
    "flash_adamw": _flash("FlashAdamW", ADAM),
    "flash_adam": _flash("FlashAdam", ADAM),
    "flash_sgd": _flash("FlashSGD", PLAIN),
    "flash_sgdw": _flash("FlashSGDW", PLAIN),
    "flash_lion": _flash("FlashLion", LION),
    "adopt_adamw": Row("axolotl.utils.optimizers.adopt:ADOPT", fixed={"decouple": True}),
    "adamc": Row("axolotl.utils.optimizers.adamc:AdamC", via="adamc"),
    "muon": Row("torch.optim:Muon", fixed={"adjust_lr_fn": "match_rms_adamw"}, via="matrix"),
    "dion": Row("axolotl.utils.optimizers.dion:Dion", via="matrix"),
    "sinkgd": Row("axolotl.utils.optimizers.sinkgd:SinkGD", via="matrix"),
    "adamw_anyprecision": Row("axolotl.utils.optimizers.anyprecision:AnyPrecisionAdamW"),
    "adamw_torch_xla": Row(
        "torch_xla.amp.syncfree:AdamW", install="It is for TPUs. On other devices write `optimizer: adamw_torch_fused`."
    ),
    "adamw_torch_npu_fused": Row(
        "torch_npu.optim:NpuFusedAdamW",
        install="It is for Ascend NPUs. On other devices write `optimizer: adamw_torch_fused`.",
    ),
}


def read_any_name(cfg: DictDefault) -> str:
    """The name of a row, or one that a plugin knows."""
    name = str(getattr(cfg.optimizer, "value", cfg.optimizer) or DEFAULT)
    return RENAMED.get(name, name)


def read_optimizer_name(cfg: DictDefault) -> str:
    """The name of a row.

    Raises:
        ConfigError: no such optimizer; near names are shown.
    """
    name = read_any_name(cfg)
    if name not in OPTIMIZERS:
        raise ConfigError(f"`optimizer: {name}` is not known.{did_you_mean(name, OPTIMIZERS, n=3)}")
    return name


def read_optimizer_args(cfg: DictDefault) -> dict[str, Any]:
    """Training arguments that name the optimizer. Those that transformers does not know are hidden from it."""
    name = read_optimizer_name(cfg)
    if name not in {member.value for member in OptimizerNames}:
        return {"optim": "adamw_torch", "alternate_optimizer": name, "dion_learning_rate": cfg.dion_lr}
    args: dict[str, Any] = {"optim": name}
    extra = read_optim_args(cfg)
    if extra:
        args["optim_args"] = ",".join(f"{key}={value}" for key, value in extra.items())
    return args


def check_optimizer(cfg: DictDefault) -> None:
    """Raise what `read_optimizer` would, before anything is loaded."""
    read_optimizer(cfg, None)


def read_optimizer(cfg: DictDefault, args: Any) -> tuple[type, dict[str, Any]]:
    """Class, or factory, and arguments of the configured optimizer.

    Args:
        cfg: the config.
        args: training arguments; None takes what they would be made from. Their `optimizer_kwargs` win over `optim_args`.

    Raises:
        ConfigError: unknown name, option or value.
        MissingExtraError: its package is not installed.
    """
    name = read_optimizer_name(cfg)
    row = OPTIMIZERS[name]
    cls = _load_class(name, row, cfg)
    more = {} if args is None else args.optimizer_kwargs or {}
    given = check_options(name, {**options_of(cls), **row.projection}, {**read_optim_args(cfg), **more})
    for key, setting in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        if key in given and cfg[setting] and given[key] != cfg[setting]:
            note_choice(
                cfg, setting, given[key], f"`optim_args: {{{key}: {given[key]}}}` takes the place of {cfg[setting]}"
            )
    settings = _read_settings(cfg, args)
    _move_betas(row, given, settings)
    common = {key: given.pop(key, settings[key]) for key in ("lr", "weight_decay")}
    own = {_argument(key): settings[key] for key in row.settings if key not in common}
    kwargs = _arrange(cfg, name, cls, own, given)
    return resolve_name(FACTORIES[row.via]) if row.via else cls, {**common, **kwargs}


def _arrange(
    cfg: DictDefault, name: str, cls: type, own: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments that the class, or the factory of its row, is called with beside learning rate and weight decay.

    Args:
        cfg: the config.
        name: of the row.
        cls: the optimizer.
        own: what it takes from keys of the config.
        given: what it takes from `optim_args`.
    """
    row = OPTIMIZERS[name]
    if row.via == "matrix":
        matrix = {**row.fixed, **(_read_dion(cfg) if name == "dion" else {}), **given}
        return {
            "matrix_cls": cls,
            "matrix_lr": matrix.pop("lr", None),
            "matrix_kwargs": matrix,
            "adamw_kwargs": dict(own),
        }
    if row.via in ("galore", "apollo"):
        projection = {**read_projection(cfg), **{key: given[key] for key in row.projection if key in given}}
        if (projection.get("scale_type"), projection.get("proj_type", "std") == "std") == ("channel", False):
            raise ConfigError(
                f"`optim_args: {{proj_type: {projection['proj_type']}}}` of `optimizer: {name}` does not fit its scale by channel, which is "
                "for the longer side of a matrix. Write `scale_type: tensor` beside it, or `proj_type: std`."
            )
        inner = {key: value for key, value in given.items() if key not in projection}
        kwargs = {
            "name": name,
            "inner_cls": cls,
            "inner_kwargs": {**own, **row.fixed, **inner},
            "projection": projection,
            "layerwise": row.layerwise,
        }
        return kwargs if row.via == "galore" else {**kwargs, "projects_itself": True, "state_types": _apollo_states()}
    kwargs = {**own, **row.fixed, **_without_cuda(cfg, name), **given}
    return kwargs if row.via != "lomo" else {**kwargs, "optimizer_cls": cls}


def _load_class(name: str, row: Row, cfg: DictDefault) -> type:
    if cfg.torchdistx_path and name == "adamw_anyprecision":
        note_choice(cfg, "torchdistx_path", None, "the optimizer is part of this package; torchdistx is not needed")
    package = row.path.partition(":")[0].partition(".")[0]
    try:
        importlib.import_module(package)
        cls = resolve_name(row.path)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise ConfigError(f"`optimizer: {name}`: the package `{package}` cannot be imported: {error}.") from error
        if row.install:
            raise ConfigError(
                f"`optimizer: {name}` needs the package `{package}`, which is not installed. {row.install}"
            ) from error
        raise MissingExtraError(package, row.extra, f"`optimizer: {name}`") from error
    return resolve_name(row.wrap)(cls) if row.wrap else cls


def _argument(setting: str) -> str:
    return {"betas3": "betas", "eps2": "eps"}.get(setting, setting)


def _read_settings(cfg: DictDefault, args: Any) -> dict[str, Any]:
    """What optimizers take from keys of the config, by name in `Row.settings`."""
    source = cfg if args is None else args

    def value(key: str, default: Any) -> Any:
        found = getattr(source, key)
        return default if found is None else found

    beta1, beta2 = value("adam_beta1", 0.9), value("adam_beta2", 0.999)
    beta3 = value("adam_beta3", 0.9999)
    warmup = 0 if args is None else args.get_warmup_steps(max(args.max_steps, 0))
    return {
        "lr": float(value("learning_rate", 0.0)),
        "weight_decay": float(value("weight_decay", 0.0)),
        "betas": (beta1, beta2),
        "betas3": (beta1, beta2, beta3),
        "eps": value("adam_epsilon", 1e-8),
        # CAME's epsilons are far below Adam's: only what the config says counts.
        "eps2": (
            1e-30 if cfg.adam_epsilon is None else cfg.adam_epsilon,
            1e-16 if cfg.adam_epsilon2 is None else cfg.adam_epsilon2,
        ),
        "warmup_steps": int(warmup),
    }


def _move_betas(row: Row, given: dict[str, Any], settings: dict[str, Any]) -> None:
    """`beta1`, `beta2` and `beta3` of `optim_args` are entries of `betas`."""
    for setting in ("betas", "betas3"):
        betas = list(given.get("betas", settings[setting]))
        settings[setting] = tuple(given.get(f"beta{i}", beta) for i, beta in enumerate(betas, start=1))
    moved = [key for key in ("betas", "beta1", "beta2", "beta3") if key in given]
    if moved and ("betas" in row.settings or "betas3" in row.settings):
        for key in moved:
            del given[key]


def _read_dion(cfg: DictDefault) -> dict[str, Any]:
    if cfg.dion_lr is None:
        note_choice(cfg, "dion_lr", 0.01, "that of the paper; `learning_rate` is for the parameters that AdamW updates")
    given = {
        "lr": 0.01 if cfg.dion_lr is None else cfg.dion_lr,
        "momentum": cfg.dion_momentum,
        "rank_fraction": cfg.dion_rank_fraction,
        "rank_multiple_of": cfg.dion_rank_multiple_of,
    }
    return {key: value for key, value in given.items() if value is not None}


def read_projection(cfg: DictDefault) -> dict[str, Any]:
    """Options of the projection of GaLore, Q-GaLore and APOLLO, without those of `optim_args`; empty for others."""
    name = read_any_name(cfg)
    row = OPTIMIZERS.get(name)
    return _read_q_galore(cfg) if name == "q_galore_adamw8bit" else dict(row.projection) if row else {}


def _read_q_galore(cfg: DictDefault) -> dict[str, Any]:
    given = {key.removeprefix("qgalore_"): cfg[key] for key in Q_GALORE_KEYS}
    if cfg.qgalore_proj_quant is False:
        given["proj_bits"] = 0
    if given["proj_type"] not in (None, *CHOICES["proj_type"]):
        raise ConfigError(
            f"`qgalore_proj_type: {given['proj_type']}` must be one of {', '.join(CHOICES['proj_type'])}."
        )
    return {key: value for key, value in given.items() if value is not None}


def _apollo_states() -> tuple[type, ...]:
    paths = ("apollo_torch.random_projector:GradientProjector", "apollo_torch.svd_projector:GaLoreProjector")
    return tuple(resolve_name(path) for path in paths)


def _without_cuda(cfg: DictDefault, name: str) -> dict[str, Any]:
    """Arguments that keep the Triton kernels of a library away from devices that have none."""
    if torch.cuda.is_available():
        return {}
    if name == "stable_adamw":
        return {"triton": False}
    if not name.startswith("flash_"):
        return {}
    plain = {"quantize": False, "fused": False, "master_weight_bits": None}
    note_choice(cfg, "optim_args", plain, f"`optimizer: {name}` compresses its states on CUDA devices only")
    return plain
