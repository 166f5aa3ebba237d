"""The environment of a command, before any library reads it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Variables of older library versions and container images -> the one that today's libraries read.
RENAMED_VARIABLES = {
    "TRANSFORMERS_CACHE": "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE": "HF_HUB_CACHE",
    "HF_HUB_ENABLE_HF_TRANSFER": "HF_XET_HIGH_PERFORMANCE",
    "TORCH_CUDA_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF",
}


def prepare_environment() -> None:
    """Read `.env`, carry renamed variables over, and set what the libraries should start with.

    A variable that is already set is never changed. Nothing is sent anywhere.
    """
    read_env_file(Path(".env"))
    for old, new in RENAMED_VARIABLES.items():
        if old in os.environ:
            os.environ.setdefault(new, os.environ[old])
    volume = os.environ.get("BASE_VOLUME")
    if volume and Path(volume).is_dir() and "HF_HUB_CACHE" not in os.environ:
        os.environ.setdefault("HF_HOME", str(Path(volume) / "huggingface-cache"))
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Sequence lengths change from batch to batch; segments that grow keep the allocator from fragmenting.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not sys.stderr.isatty():
        # In a log file, every update of a bar is a line.
        for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(variable, "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


def read_env_file(path: Path) -> None:
    """Set the variables of a `.env` file that the environment does not have yet.

    A line is `NAME=value`, with or without `export`; the value may stand in single or double quotes; ` #` begins a comment
    outside of quotes. Other lines are passed over.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, PermissionError, IsADirectoryError, UnicodeDecodeError):
        return
    for line in lines:
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            continue
        value = value.strip()
        if value[:1] in ("'", '"') and (end := value.find(value[0], 1)) > 0:
            value = value[1:end]
        else:
            value = value.split(" #")[0].rstrip()
        os.environ.setdefault(name, value)
