"""Callbacks: what watches a run or acts at its edges without touching the loss.

One module per concern. `build` reads the config and makes the list; to add a callback, write a module here and a row there.
"""

from axolotl._lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DynamicCheckpointCallback": "axolotl.utils.callbacks.dynamic_checkpoint",
        "GCCallback": "axolotl.utils.callbacks.guards",
        "LossWatchDogCallback": "axolotl.utils.callbacks.guards",
        "Perplexity": "axolotl.utils.callbacks.perplexity",
        "ProgressCallback": "axolotl.utils.callbacks.progress",
        "PytorchProfilerCallback": "axolotl.utils.callbacks.profiler",
        "SaveAxolotlConfigtoCometCallback": "axolotl.utils.callbacks.comet_",
        "SaveAxolotlConfigtoMlflowCallback": "axolotl.utils.callbacks.mlflow_",
        "SaveAxolotlConfigtoWandBCallback": "axolotl.utils.callbacks.wandb_",
        "SaveModelOnFirstStepCallback": "axolotl.utils.callbacks.guards",
        "SkipEvalOnResumeCallback": "axolotl.utils.callbacks.guards",
    },
)
