"""Training arguments: those of transformers and TRL, each with ours mixed in.

`AxolotlTrainingArguments` is what the causal trainer takes. The classes for preference and reward training are built on
TRL's configs and imported from TRL when first used, because TRL is slow to import.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field, make_dataclass
from typing import Any

from transformers import TrainingArguments

from axolotl.core.training_args_base import AxolotlTrainingMixins

__all__ = ["AxolotlTrainingArguments", "AxolotlTrainingMixins"]


@dataclass
class AxolotlTrainingArguments(AxolotlTrainingMixins, TrainingArguments):
    """Training arguments of the causal trainer."""


# name -> (module of the TRL config, its name, further fields)
_TRL_CONFIGS: dict[str, tuple[str, str, list[tuple[str, Any, Any]]]] = {
    "AxolotlORPOConfig": ("trl.experimental.orpo", "ORPOConfig", []),
    "AxolotlKTOConfig": ("trl", "KTOConfig", []),
    "AxolotlCPOConfig": (
        "trl.experimental.cpo",
        "CPOConfig",
        [("simpo_gamma", float | None, field(default=None, metadata={"help": "Margin of SimPO."}))],
    ),
    "AxolotlRewardConfig": ("trl", "RewardConfig", []),
    "AxolotlPRMConfig": (
        "transformers",
        "TrainingArguments",
        [
            ("max_length", int | None, field(default=1024, metadata={"help": "Longest row, in tokens."})),
            ("step_separator", str, field(default="\n", metadata={"help": "Text between two steps."})),
            ("train_on_last_step_only", bool, field(default=False, metadata={"help": "Label only the last step."})),
        ],
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _TRL_CONFIGS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, base_name, fields = _TRL_CONFIGS[name]
    base = getattr(importlib.import_module(module), base_name)
    cls = make_dataclass(name, fields, bases=(AxolotlTrainingMixins, base), namespace={"__module__": __name__})
    cls.__doc__ = f"{base_name} of TRL with the arguments of `AxolotlTrainingMixins`."
    setattr(sys.modules[__name__], name, cls)
    return cls
