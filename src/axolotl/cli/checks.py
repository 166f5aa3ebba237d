"""Various checks for Axolotl CLI."""

from __future__ import annotations

import os
from pathlib import Path

from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


def check_accelerate_default_config() -> None:
    """Logs at warning level if an accelerate config file is found: `accelerate launch` then obeys it, not the YAML."""
    from accelerate.commands.config import config_args

    path = Path(config_args.default_yaml_config_file)
    if path.exists():
        LOG.warning(
            "accelerate has a config file at %s. `accelerate launch` takes the number of processes, mixed precision, FSDP and "
            "DeepSpeed from it unless told otherwise. Remove it, or pass `-- --config_file FILE`, if that is not meant.",
            path,
        )


def check_user_token() -> bool:
    """Checks for HF user info. Check is skipped if HF_HUB_OFFLINE=1.

    Returns:
        Whether the hub knows the user; True when the check is skipped or the hub cannot be reached.
    """
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        LOG.info("HF_HUB_OFFLINE=1: the Hugging Face token is not checked")
        return True
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    try:
        return bool(HfApi().whoami())
    except LocalTokenNotFoundError:
        LOG.warning(
            "no Hugging Face token found: run `hf auth login` or set HF_TOKEN to use gated or private repositories"
        )
        return False
    except (HTTPError, OSError) as error:
        LOG.warning("the Hugging Face token could not be checked: %s", error)
        return True
