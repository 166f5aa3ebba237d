"""What differs between architectures: one row per `model_type`.

In: a `model_type`. Out: its `ModelSupport`; an unknown architecture gets the default row, which fits most decoders. Which
architectures a single feature is tested with stands with the feature.
"""

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MODEL_SUPPORT": "axolotl.model_support.table",
        "ModelSupport": "axolotl.model_support.table",
        "read_model_support": "axolotl.model_support.table",
    },
)
