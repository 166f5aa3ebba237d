"""Prepared datasets on the Hugging Face hub: `push_dataset_to_hub` keeps a copy of each under its key."""

from __future__ import annotations

import datasets
from datasets import Dataset
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

from axolotl.exceptions import OutputError
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

HUB_ERRORS = (
    OSError,
    ValueError,
    HTTPError,
    OfflineModeIsEnabled,
    HFValidationError,
    datasets.exceptions.DatasetsError,
)


def load_pushed(repo: str, key: str) -> Dataset | None:
    """The rows that an earlier run pushed under this key, or None."""
    try:
        pushed = datasets.load_dataset(repo, key, split="train", token=True)
    except HUB_ERRORS as error:
        LOG.debug(f"`push_dataset_to_hub: {repo}` has no prepared rows {key}: {type(error).__name__}")
        return None
    LOG.info(f"prepared dataset with the same content found on the hub in {repo}: {len(pushed):,} rows")
    return pushed


def push_prepared(dataset: Dataset, repo: str, key: str) -> None:
    """Keep a private copy of prepared rows on the hub.

    Raises:
        OutputError: the hub does not take them.
    """
    try:
        dataset.push_to_hub(repo, config_name=key, private=True, token=True)
    except HUB_ERRORS as error:
        raise OutputError(
            f"`push_dataset_to_hub: {repo}` failed ({type(error).__name__}: {error}). The rows are prepared on this machine and "
            "will be found by the next run. Check the name and that the token may write (`hf auth login`), or remove the key."
        ) from error
    LOG.info(f"prepared dataset pushed to {repo}")
