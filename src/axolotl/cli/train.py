"""CLI to run training on a model."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.art import print_axolotl_text_art
from axolotl.cli.checks import check_accelerate_default_config, check_user_token
from axolotl.cli.config import load_cfg
from axolotl.cli.utils.args import split_cli_args
from axolotl.utils.dict import DictDefault
from axolotl.utils.garbage import importing
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)


def do_cli(config: Path | str = Path("examples/"), **kwargs: Any) -> None:
    """Parses `axolotl` config, CLI args, and calls `do_train`.

    Args:
        config: Path to `axolotl` config YAML file.
        kwargs: Additional keyword arguments to correspond to CLI args or `axolotl` config values.
    """
    print_axolotl_text_art()
    cli_args, overrides = split_cli_args(TrainerCliArgs, kwargs)
    do_train(load_cfg(config, **overrides), cli_args)


def do_train(cfg: DictDefault, cli_args: TrainerCliArgs) -> None:
    """Trains a `transformers` model by first loading the dataset(s) specified in the `axolotl` config, and then calling
    `axolotl.train.train`. Also runs the plugin manager's `post_train_unload` once training completes.

    Args:
        cfg: Dictionary mapping `axolotl` config keys to values.
        cli_args: Training-specific CLI arguments.
    """
    with importing():
        from axolotl.common.datasets import check_given_rows, load_datasets, load_preference_datasets
        from axolotl.integrations.base import PluginManager
        from axolotl.train import train
        from axolotl.utils.callbacks.trackers import check_trackers
        from axolotl.utils.distributed import get_rank

    check_accelerate_default_config()
    if cfg.hub_model_id or cfg.push_dataset_to_hub:
        check_user_token()
    # A tracker that cannot start is found out before hours go into the data.
    check_trackers(cfg, is_main_process=get_rank() == 0)
    manager = PluginManager.get_instance()
    dataset_meta = manager.load_datasets(cfg, preprocess=False)
    if dataset_meta is None:
        load = load_preference_datasets if cfg.rl else load_datasets
        dataset_meta = load(cfg=cfg, cli_args=cli_args)
    else:
        check_given_rows(cfg=cfg, dataset_meta=dataset_meta)

    if get_rank() == 0:
        warn_of_memory(cfg, dataset_meta.train_dataset)

    model, tokenizer, trainer = train(cfg=cfg, dataset_meta=dataset_meta)

    # Plugins that go on after the run, such as an evaluation harness, need the memory of the device.
    del model, tokenizer, trainer
    gc.collect()
    manager.post_train_unload(cfg)


def warn_of_memory(cfg: DictDefault, train_dataset: Any) -> None:
    """Say, before the model is loaded, that the run will probably not fit the GPU of this rank, and what would help.

    Args:
        cfg: the resolved config.
        train_dataset: prepared rows, or a stream.
    """
    import torch

    if not torch.cuda.is_available():
        return
    if cfg.device_map == "auto" and torch.cuda.device_count() > 1:
        return  # the model will be spread over several GPUs
    from axolotl.plan import describe_shortage
    from axolotl.utils.forecast import CONTEXT_BYTES

    free_bytes, _ = torch.cuda.mem_get_info(cfg.local_rank or 0)
    try:
        # The forecast counts the context of this process, which is there by now.
        text = describe_shortage(cfg, train_dataset, free_bytes + CONTEXT_BYTES)
    except Exception as error:  # noqa: BLE001 - advice must not end a run; a model may lack what the forecast reads
        LOG.info(f"The memory of this run could not be forecast: {error}")
        return
    if text:
        LOG.warning(text)


if __name__ == "__main__":
    from axolotl.cli.main import run_module

    run_module("train")
