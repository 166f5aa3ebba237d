"""Saving the optimizer under FSDP. Old name: see axolotl._moved."""

from __future__ import annotations

from axolotl._moved import old_name

__getattr__ = old_name(__name__)


def patch_training_loop_for_fsdp() -> None:
    """Nothing is left to patch: every Trainer of the supported range saves the optimizer under FSDP by itself."""
