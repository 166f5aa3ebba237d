"""Keys of experiment trackers become the environment variables that the trackers read."""

from __future__ import annotations

import json
import os
from typing import Any

from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

# Prefix of the keys -> the key that switches the tracker on, and the switch that is then set.
TRACKERS: dict[str, tuple[str, str]] = {
    "wandb": ("wandb_project", "use_wandb"),
    "mlflow": ("mlflow_experiment_name", "use_mlflow"),
    "comet": ("comet_project_name", "use_comet"),
    "trackio": ("trackio_project_name", "use_trackio"),
}

# Keys whose variable is not the key in capitals.
VARIABLES: dict[str, str] = {
    "comet_mode": "COMET_START_MODE",
    "comet_online": "COMET_START_ONLINE",
    "trackio_project_name": "TRACKIO_PROJECT",
    "hf_mlflow_log_artifacts": "HF_MLFLOW_LOG_ARTIFACTS",
}

# What `wandb.watch` can record. Its default is the first, which is what `true` means.
WATCHED = ("gradients", "parameters", "all")


def prepare_tracking(cfg: DictDefault) -> None:
    """Set the variables of every tracker that the config names. A variable of the environment keeps its value where the
    config writes none.

    Args:
        cfg: `use_wandb`, `use_mlflow`, `use_comet` and `use_trackio` are set where the tracker's project is written.
    """
    prefixes = tuple(f"{name}_" for name in TRACKERS)
    for key, value in cfg.items():
        if value is None or not (key.startswith(prefixes) or key in VARIABLES):
            continue
        if key == "comet_experiment_config":
            for name, setting in value.items():
                os.environ[f"COMET_START_EXPERIMENT_{name.upper()}"] = _as_variable(setting)
            continue
        os.environ[VARIABLES.get(key, key.upper())] = _as_variable(value)
    if cfg.wandb_watch:
        os.environ["WANDB_WATCH"] = read_watched(cfg.wandb_watch)
    if cfg.wandb_run_id:
        # The key is there to continue a run: without this, one of the same id would be overwritten.
        os.environ.setdefault("WANDB_RESUME", "allow")
    if cfg.mlflow_tracking_uri and _is_folder(cfg.mlflow_tracking_uri):
        # MLflow 3.7 and later ask for a word of consent to what the key already asks for.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    # A server that is lost on the way holds a run up for seconds; seven tries, the default, take minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    if cfg.wandb_mode == "disabled" and cfg.use_wandb is None:
        cfg.use_wandb = False
    for project_key, switch in TRACKERS.values():
        if cfg.get(project_key) and cfg.get(switch) is None:
            cfg[switch] = True
    if cfg.use_wandb:
        os.environ.pop("WANDB_DISABLED", None)
    else:
        os.environ["WANDB_DISABLED"] = "true"


def read_watched(value: str | bool) -> str:
    """`wandb_watch` as the word that transformers hands to `wandb.watch`; `false` for none."""
    word = _as_variable(value).strip().lower()
    if word in WATCHED or word == "false":
        return word
    if word != "true":
        LOG.warning(f"`wandb_watch: {value}` records nothing. Write one of {', '.join(WATCHED)}, or false.")
        return "false"
    return WATCHED[0]


def _is_folder(uri: str) -> bool:
    return uri.startswith("file:") or ("://" not in uri and uri not in ("databricks", "uc"))


def _as_variable(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
