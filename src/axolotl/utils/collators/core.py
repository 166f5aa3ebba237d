"""Basic shared collator constants."""

from __future__ import annotations

IGNORE_INDEX = -100
