"""Builders: from a config, a model and datasets to a trainer that is ready to run.

To support a key of the config, add it to the reader of its subject in `arguments`; to support another kind of training, add
a builder here and a row in `axolotl.utils.trainer`.
"""

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "HFCausalTrainerBuilder": "axolotl.core.builders.causal",
        "HFRLTrainerBuilder": "axolotl.core.builders.rl",
    },
)
