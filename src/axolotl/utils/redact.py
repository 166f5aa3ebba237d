"""Secrets are taken out of whatever is logged or saved."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "[redacted]"

_SECRET_KEY = re.compile(
    r"api_?key|secret|password|passwd|credential|webhook|^token$|(auth|access|hub|hf|api|bearer)_token$", re.IGNORECASE
)
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")


def redact_secrets(value: Any, key: str = "") -> Any:
    """A plain copy of `value` in which every text under a key that names a secret reads `[redacted]`.

    Keys of special tokens (`pad_token`, `eos_token`) are not secrets; a switch such as `hf_use_auth_token: true` stays.
    """
    if isinstance(value, dict):
        return {name: redact_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_secrets(item, key) for item in value]
    if isinstance(value, str) and value:
        return HIDDEN if _SECRET_KEY.search(key) else _PASSWORD_IN_URL.sub(HIDDEN, value)
    return value
