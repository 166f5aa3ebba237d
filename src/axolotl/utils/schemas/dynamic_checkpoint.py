"""The `dynamic_checkpoint` section: save when asked, while a run goes on."""

from __future__ import annotations

from axolotl.utils.schemas.fields import Int, Words, key


class DynamicCheckpointConfig(Words):
    """Save a checkpoint when a file appears."""

    enabled: bool = key("Watch for the file.", False)
    check_interval: Int = key("Optimizer steps between looks.", 10, ge=1)
    trigger_file_path: str = key(
        "File that asks for a checkpoint. Default: `axolotl_checkpoint.save` in `output_dir`.", ""
    )
