"""The plugin class of `axolotl.integrations.expert_parallel`."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class ExpertParallelPlugin(BasePlugin):
    """Expert parallelism: spread the experts of a model over GPUs."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.expert_parallel.args.ExpertParallelArgs"
