"""Expert parallelism: spread the experts of a model over GPUs.

List `axolotl.integrations.expert_parallel.ExpertParallelPlugin` under `plugins:`; its keys are in `args`.
"""

from __future__ import annotations

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ExpertParallelPlugin": "axolotl.integrations.expert_parallel.plugin",
        "ExpertParallelArgs": "axolotl.integrations.expert_parallel.args",
    },
)
