"""User Defined prompts with configuration from the YML config"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from axolotl.exceptions import ConfigError
from axolotl.prompt_strategies.alpaca_w_system import InstructionWSystemPromptTokenizingStrategy, SystemDataPrompter
from axolotl.prompt_tokenizers import PromptTokenizingStrategy
from axolotl.utils.chat_templates.properties import NamedProperties

NAMES_OF_COLUMNS = ("field_system", "field_input")
"""Fields that rows may lack."""


@dataclass
class UserDefinedDatasetConfig:
    """dataclass configuration representing a userdefined dataset type"""

    system_prompt: str = ""
    field_system: str = "system"
    field_instruction: str = "instruction"
    field_input: str = "input"
    field_output: str = "output"
    format: str = "{instruction} {input} "
    no_input_format: str = "{instruction} "
    system_format: str = "{system}"

    def __getitem__(self, item: str) -> Any:
        return getattr(self, item)


class UserDefinedPrompter(SystemDataPrompter):
    """Builds prompts from the formats of the config.

    Raises:
        ConfigError: a format names a field that it cannot have.
    """

    def __init__(self, config: UserDefinedDatasetConfig):
        self.config = config
        super().__init__()

    def match_prompt_style(self) -> None:
        _check_format("format", self.config.format, {"instruction", "input"})
        _check_format("no_input_format", self.config.no_input_format, {"instruction"})
        _check_format("system_format", self.config.system_format, {"system"})
        self.turn_format = self.config.format
        self.turn_no_input_format = self.config.no_input_format
        self.system_format = self.config.system_format


class UserDefinedPromptTokenizationStrategy(InstructionWSystemPromptTokenizingStrategy):
    """Prompt Tokenization Strategy for user defined prompts"""

    def parse_instruction_fields(self, prompt: dict[str, Any]) -> tuple[str, str, str, str]:
        config = self.prompter.config
        system = prompt.get(config.field_system)
        return (
            prompt[config.field_instruction],
            prompt.get(config.field_input) or "",
            prompt[config.field_output],
            config.system_prompt if system is None else system,
        )


def load(
    tokenizer, cfg, ds_cfg: UserDefinedDatasetConfig | Mapping[str, Any] | None = None
) -> PromptTokenizingStrategy:
    """The strategy of a dataset whose `type:` is a mapping.

    Args:
        ds_cfg: that mapping, or the config of the dataset that holds it under `type`.
    """
    if not ds_cfg:
        raise ConfigError(
            "Missing dataset prompt configuration: `type:` must be a mapping, such as `field_output: answer`."
        )
    written = {} if isinstance(ds_cfg, UserDefinedDatasetConfig) else _read(ds_cfg)
    config = ds_cfg if isinstance(ds_cfg, UserDefinedDatasetConfig) else UserDefinedDatasetConfig(**written)
    strategy = UserDefinedPromptTokenizationStrategy(
        UserDefinedPrompter(config), tokenizer, cfg.train_on_inputs, cfg.sequence_len
    )
    strategy.named_properties = NamedProperties(
        columns={key: written[key] for key in NAMES_OF_COLUMNS if key in written}
    )
    return strategy


def _read(mapping: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(mapping.get("type"), Mapping):
        mapping = mapping["type"]
    known = {field.name for field in dataclasses.fields(UserDefinedDatasetConfig)}
    return {key: mapping[key] for key in known if mapping.get(key) is not None}


def _check_format(key: str, text: str, fields: set[str]) -> None:
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise ConfigError(
            f"`type.{key}: {text!r}` cannot be filled in: {error}. Write {{{{ for a literal brace."
        ) from error
    if named - fields:
        raise ConfigError(
            f"`type.{key}: {text!r}` names {{{', '.join(sorted(named - fields))}}}, but it can only have "
            f"{', '.join(f'{{{field}}}' for field in sorted(fields))}. Write {{{{ and }}}} for literal braces."
        )
