"""The plugin class of `axolotl.integrations.kd`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class KDPlugin(BasePlugin):
    """Knowledge distillation: learn a teacher's log probabilities."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.kd.args.KDArgs"
