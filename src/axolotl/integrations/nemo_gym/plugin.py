"""The plugin class of `axolotl.integrations.nemo_gym`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class NemoGymPlugin(BasePlugin):
    """Reinforcement learning in the environments of NVIDIA NeMo Gym."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.nemo_gym.args.NemoGymArgs"
