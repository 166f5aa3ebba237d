"""Helpers of the schema that are documented on their own."""

from __future__ import annotations

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

LEGACY_PREFIX = "message_field_"
# `message_field_training` and `message_field_training_detail` are keys in their own right.
NOT_LEGACY = frozenset({"message_field_training", "message_field_training_detail"})


def handle_legacy_message_fields_logic(data: dict) -> dict:
    """Move `message_field_<property>` keys of a dataset into `message_property_mappings`.

    Args:
        data: one entry of `datasets`; not changed.

    Returns:
        A copy without the legacy keys.

    Raises:
        ValueError: a property is mapped in both ways, and differently.
    """
    data = dict(data)
    written = data.get("message_property_mappings")
    mappings = dict(written) if isinstance(written, dict) else {}
    legacy = [name for name in data if str(name).startswith(LEGACY_PREFIX) and name not in NOT_LEGACY]
    for name in legacy:
        field = data.pop(name)
        if field is None:
            continue
        prop = name.removeprefix(LEGACY_PREFIX)
        LOG.warning_once(
            f"`{name}: {field}` is deprecated. Write it under `message_property_mappings` as `{prop}: {field}`."
        )
        if mappings.setdefault(prop, field) != field:
            raise ValueError(
                f"Conflicting message property fields for `{prop}`: `{name}: {field}` and "
                f"`message_property_mappings.{prop}: {mappings[prop]}`. Keep the second only."
            )
    if mappings:
        data["message_property_mappings"] = mappings
    return data
