"""axolotl: LLM post-training from one YAML file.

What comes in: a YAML config. What goes out: a trained model or adapter with everything needed to use it again.
Nothing is imported here, so that `axolotl --help` answers at once.

Tracker libraries send reports to their makers, or log what other libraries log, without being asked. They read once, when they
are imported, whether they may; so the answer stands here. A variable that is set already keeps its value.
"""

import os

for _name, _value in {
    # Installed next to MLflow or TensorBoard, Comet would upload what these log.
    "COMET_DISABLE_AUTO_LOGGING": "1",
    "COMET_INTERNAL_SENTRY_DSN": "",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}.items():
    os.environ.setdefault(_name, _value)

__version__ = "0.1.0"
