"""`AxolotlInputConfig`: every key of a config."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import ModelWrapValidatorHandler, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from axolotl.exceptions import ConfigError
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.attention import AttentionConfig
from axolotl.utils.schemas.data import DataConfig
from axolotl.utils.schemas.deprecated import DeprecatedParameters, apply_renames
from axolotl.utils.schemas.distributed import DistributedConfig
from axolotl.utils.schemas.enums import OPTIMIZERS, SCHEDULERS, RLType
from axolotl.utils.schemas.errors import explain
from axolotl.utils.schemas.fields import BLANK_IS_NONE, IGNORE_CASE, Int, Text, Words, key
from axolotl.utils.schemas.integrations import (
    CometConfig,
    GradioConfig,
    LISAConfig,
    MLFlowConfig,
    OpenTelemetryConfig,
    RayConfig,
    TrackioConfig,
    WandbConfig,
)
from axolotl.utils.schemas.internal import EnvCapabilities, GPUCapabilities, InternalConfig
from axolotl.utils.schemas.memory import PrecisionConfig
from axolotl.utils.schemas.model import ModelInputConfig, ModelOutputConfig
from axolotl.utils.schemas.multimodal import MultiModalConfig
from axolotl.utils.schemas.peft import LoraConfig, ReLoRAConfig
from axolotl.utils.schemas.reward import RewardConfig
from axolotl.utils.schemas.schedule import ScheduleConfig
from axolotl.utils.schemas.tokens import TokensConfig
from axolotl.utils.schemas.training import HyperparametersConfig, JaggedLRConfig
from axolotl.utils.schemas.unknown import unknown_keys
from axolotl.utils.schemas.validation import run_checks

LOG = get_logger(__name__)

# Context for `model_validate` by a caller that has done the renames and will do the rest itself.
FIELDS_ONLY = {"fields_only": True}

# Keys whose values are names that a plugin may add to.
NAMES = {"optimizer": OPTIMIZERS, "lr_scheduler": SCHEDULERS}


class RunConfig(Words):
    """What kind of run this is, and where it continues."""

    strict: bool | None = key("Refuse flags on the command line for keys that are not in the file.", False)
    rl: Annotated[RLType | None, IGNORE_CASE] = key(
        "Learn from preferences or rewards: dpo, gdpo, grpo, ipo, orpo, kto, simpo or ebft."
    )
    plugins: list[str] | None = key("Plugins, as importable paths, such as `axolotl.integrations.liger.LigerPlugin`.")
    resume_from_checkpoint: Annotated[Text | bool | None, BLANK_IS_NONE] = key("Checkpoint to continue from.")
    auto_resume_from_checkpoints: bool | None = key(
        "Continue from the last whole checkpoint in `output_dir`, if there is one."
    )
    trainer_cls: str | None = key(
        "Trainer class, as an importable path. It inherits from `AxolotlTrainer`, or gets it as a base for the run."
    )
    seed: Int | None = key("Seed of every random choice. Default: 42.", ge=0, le=2**32 - 1)
    world_size: Int | None = key("Number of processes; set by the launcher.")
    local_rank: Int | None = key("Number of this process on its machine; set by the launcher.")


class AxolotlInputConfig(
    ModelInputConfig,
    ModelOutputConfig,
    TokensConfig,
    LoraConfig,
    ReLoRAConfig,
    JaggedLRConfig,
    HyperparametersConfig,
    RewardConfig,
    DataConfig,
    AttentionConfig,
    PrecisionConfig,
    DistributedConfig,
    ScheduleConfig,
    MultiModalConfig,
    WandbConfig,
    MLFlowConfig,
    CometConfig,
    TrackioConfig,
    OpenTelemetryConfig,
    LISAConfig,
    GradioConfig,
    RayConfig,
    InternalConfig,
    DeprecatedParameters,
    # Fields of the last base are read first: others look at `rl` and `plugins`.
    RunConfig,
):
    """Every key of a config."""

    @field_validator("optimizer", "lr_scheduler")
    @classmethod
    def name_is_known_or_a_plugins(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Names of our own; with plugins, which may bring their own, any name."""
        names = NAMES[info.field_name]
        if value is None or value in names or info.data.get("plugins"):
            return value
        raise PydanticCustomError("unknown_name", "a known name", {"expected": ", ".join(sorted(names))})

    @model_validator(mode="wrap")
    @classmethod
    def every_rule_of_the_config(
        cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        """Renames, unknown keys and checks across groups hold whoever makes the model."""
        if not isinstance(data, dict) or info.context == FIELDS_ONLY:
            return handler(data)
        cfg = DictDefault(data)
        problems = apply_renames(cfg)
        errors, warnings = unknown_keys(cfg, cls)
        for warning in warnings:
            LOG.warning_once(warning)
        problems += errors
        try:
            typed = DictDefault(handler(cfg.to_dict()).model_dump(exclude_unset=True))
        except ValidationError as error:
            raise ConfigError([*problems, *explain(error, cfg)]) from error
        problems += run_checks(typed)
        if problems:
            raise ConfigError(problems)
        return handler(typed.to_dict())


class AxolotlConfigWCapabilities(AxolotlInputConfig):
    """A config together with what the machine can do."""

    capabilities: GPUCapabilities = key("What the GPUs of this machine can do.", GPUCapabilities())
    env_capabilities: EnvCapabilities = key("What is installed.", EnvCapabilities())
