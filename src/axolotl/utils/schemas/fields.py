"""What every schema module builds on: the base model, and the types that accept values as YAML 1.1 parses them.

YAML reads `2e-4` as text, `no` as false and `12345` as a number. A key that wants a number takes the first, one that
wants a word takes the others; a boolean is never taken for a number.
"""

from __future__ import annotations

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AfterValidator, AllowInfNan, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Words(BaseModel):
    """A group of keys. Enum values are kept as plain text, so that a config stays plain data."""

    # Built when first used: most groups are only parts of the whole.
    model_config = ConfigDict(use_enum_values=True, populate_by_name=True, protected_namespaces=(), defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def a_key_left_blank_is_left_out(cls, data: Any) -> Any:
        """YAML reads `num_epochs:` as null. Where null is no value of the key, it stands for the default."""
        if not isinstance(data, dict) or None not in data.values():
            return data
        fields = cls.model_fields
        return {
            name: value
            for name, value in data.items()
            if value is not None
            or name not in fields
            or fields[name].is_required()
            or _takes_none(fields[name].annotation)
        }


def _takes_none(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _takes_none(get_args(annotation)[0])
    return annotation in (None, type(None), Any) or any(
        _takes_none(part) for part in get_args(annotation) if get_origin(annotation) in (Union, types.UnionType)
    )


# Pydantic loses these in the JSON schema of an optional number.
IN_JSON_SCHEMA = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def key(description: str, default: Any = None, **constraints: Any) -> Any:
    """A key that may be left out."""
    return Field(default, description=description, json_schema_extra=_limits(constraints), **constraints)


def required(description: str, **constraints: Any) -> Any:
    """A key that must be written."""
    return Field(..., description=description, json_schema_extra=_limits(constraints), **constraints)


def _limits(constraints: dict[str, Any]) -> dict[str, Any] | None:
    return {IN_JSON_SCHEMA[name]: value for name, value in constraints.items() if name in IN_JSON_SCHEMA} or None


def refuse_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "a number")
    return value.strip() if isinstance(value, str) else value


def refuse_beyond_64_bits(value: int) -> int:
    """No library takes a larger number."""
    if not -(2**63) <= value < 2**63:
        raise PydanticCustomError("int_parsing_size", "a smaller number")
    return value


def number_as_text(value: Any) -> Any:
    """A whole number stands for its digits. A float does not: `1e10` and `1.10` have lost how they were written.

    No path and no name holds a zero byte.
    """
    if isinstance(value, str) and "\0" in value:
        raise PydanticCustomError("zero_byte", "text without a zero byte")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        raise PydanticCustomError("unquoted_number", "text; put the number in quotes")
    return value


def lower_case(value: Any) -> Any:
    """An empty word is no word."""
    return value.strip().lower() or None if isinstance(value, str) else value


def blank_is_none(value: Any) -> Any:
    return None if isinstance(value, str) and not value.strip() else value


def upper_case(value: Any) -> Any:
    """An empty word is no word."""
    return value.strip().upper() or None if isinstance(value, str) else value


def no_as_text(value: Any) -> Any:
    """YAML 1.1 reads the bare word `no` as false."""
    return "no" if value is False else lower_case(value)


Int = Annotated[int, BeforeValidator(refuse_boolean), AfterValidator(refuse_beyond_64_bits)]
Float = Annotated[float, BeforeValidator(refuse_boolean), AllowInfNan(False)]
Text = Annotated[str, BeforeValidator(number_as_text, json_schema_input_type=str | int)]
IGNORE_CASE = BeforeValidator(lower_case)
BLANK_IS_NONE = BeforeValidator(blank_is_none)
UPPER_CASE = BeforeValidator(upper_case)
NO_IS_TEXT = BeforeValidator(no_as_text)
