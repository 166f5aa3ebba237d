"""CLI to run preprocessing of a dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from axolotl.cli.args import PreprocessCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.utils.args import split_cli_args
from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.exceptions import ConfigError
from axolotl.utils.dict import DictDefault, note_choice
from axolotl.utils.garbage import importing
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


def do_cli(config: Path | str = Path("examples/"), **kwargs: Any) -> None:
    """Parses `axolotl` config, CLI args, and calls `do_preprocess`.

    Args:
        config: Path to `axolotl` config YAML file.
        kwargs: Additional keyword arguments to correspond to CLI args or `axolotl` config values.
    """
    os.environ["AXOLOTL_IS_PREPROCESS"] = "1"
    cli_args, overrides = split_cli_args(PreprocessCliArgs, kwargs)
    cfg = load_cfg(config, **overrides)
    cfg.is_preprocess = True
    do_preprocess(cfg, cli_args)


def do_preprocess(cfg: DictDefault, cli_args: PreprocessCliArgs) -> None:
    """Preprocesses dataset specified in axolotl config.

    Args:
        cfg: Dictionary mapping `axolotl` config keys to values.
        cli_args: Preprocessing-specific CLI arguments.

    Raises:
        ConfigError: the rows of this config are prepared while training, so that there is nothing to do before.
    """
    check_can_be_prepared(cfg, cli_args)
    with importing():
        from axolotl.common.datasets import load_datasets, load_preference_datasets
        from axolotl.integrations.base import PluginManager

    if not cfg.dataset_prepared_path:
        reason = "`preprocess` needs a folder to keep the rows in; train with the same value to find them"
        cfg.dataset_prepared_path = DEFAULT_DATASET_PREPARED_PATH
        note_choice(cfg, "dataset_prepared_path", DEFAULT_DATASET_PREPARED_PATH, reason)
        LOG.warning("`dataset_prepared_path` is not set: using `%s`", DEFAULT_DATASET_PREPARED_PATH)

    if PluginManager.get_instance().load_datasets(cfg, preprocess=True) is None:
        load = load_preference_datasets if cfg.rl else load_datasets
        load(cfg=cfg, cli_args=cli_args)

    if cli_args.download:
        download_base_model(cfg)
    LOG.info("done. Prepared rows: `dataset_prepared_path: %s`", cfg.dataset_prepared_path)


def check_can_be_prepared(cfg: DictDefault, cli_args: PreprocessCliArgs) -> None:
    """Refuse what preprocessing cannot serve, instead of doing nothing."""
    if cli_args.iterable:
        raise ConfigError("`--iterable` is not supported. Write `streaming: true` and run `axolotl train` directly.")
    for key in ("pretraining_dataset", "streaming", "skip_prepare_dataset"):
        if cfg.get(key):
            raise ConfigError(
                f"`{key}` prepares the rows on demand while training, so there is nothing to preprocess. Run `axolotl train` "
                f"directly, or remove `{key}`."
            )


def download_base_model(cfg: DictDefault) -> None:
    """Fetch the files of the base model into the cache of the hub, without loading them. A failure is a warning."""
    if not cfg.base_model or Path(cfg.base_model).exists() or os.environ.get("HF_HUB_OFFLINE") == "1":
        return
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(
            cfg.base_model,
            revision=cfg.revision_of_model,
            allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"],
            ignore_patterns=["original/*", "consolidated*"],
        )
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:
        LOG.warning("`base_model: %s` was not downloaded ahead of training: %s", cfg.base_model, error)


if __name__ == "__main__":
    import sys

    from axolotl.cli.main import command

    command(["preprocess", *sys.argv[1:]])
