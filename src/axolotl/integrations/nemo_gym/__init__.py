"""Reinforcement learning in the environments of NVIDIA NeMo Gym.

List `axolotl.integrations.nemo_gym.NemoGymPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "NemoGymPlugin": "axolotl.integrations.nemo_gym.plugin",
        "NemoGymArgs": "axolotl.integrations.nemo_gym.args",
    },
)
