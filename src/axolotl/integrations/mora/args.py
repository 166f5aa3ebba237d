"""Keys of the mora plugin."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from axolotl.utils.schemas.fields import Words, key

NUMBERED = {1: "sharing", 6: "rope", "1": "sharing", "6": "rope"}


def name_of_type(value: Any) -> Any:
    """The types are also known by the numbers of the paper's code."""
    if isinstance(value, str):
        value = value.strip().lower()
    return NUMBERED.get(value, value) if isinstance(value, int | str) else value


class MoraConfig(Words):
    """MoRA: adapters that are square instead of low-rank (https://arxiv.org/abs/2405.12130)."""

    use_mora: bool = key("Use MoRA.", True)
    mora_type: Annotated[Literal["sharing", "rope"], BeforeValidator(name_of_type)] = key(
        "How inputs are compressed: `sharing` (1) or `rope` (6).", "rope"
    )


class MoraArgs(Words):
    """MoRA adapters."""

    mora: MoraConfig | None = key("Options of `adapter: mora`.")
