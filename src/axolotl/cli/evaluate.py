"""CLI to run evaluation on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.cli.args import EvaluateCliArgs
from axolotl.cli.checks import check_accelerate_default_config
from axolotl.cli.config import load_cfg
from axolotl.cli.utils.args import split_cli_args
from axolotl.utils.dict import DictDefault
from axolotl.utils.garbage import importing


def do_cli(config: Path | str = Path("examples/"), **kwargs: Any) -> None:
    """Parses `axolotl` config, CLI args, and calls `do_evaluate`.

    Args:
        config: Path to `axolotl` config YAML file.
        kwargs: Additional keyword arguments to correspond to CLI args or `axolotl` config values.
    """
    cli_args, overrides = split_cli_args(EvaluateCliArgs, kwargs)
    do_evaluate(load_cfg(config, **overrides), cli_args)


def do_evaluate(cfg: DictDefault, cli_args: EvaluateCliArgs) -> dict[str, float]:
    """Evaluates a `transformers` model by first loading the dataset(s) specified in the `axolotl` config, and then calling
    `axolotl.evaluate.evaluate`, which computes evaluation metrics on the given dataset(s) and writes them to disk.

    Args:
        cfg: Dictionary mapping `axolotl` config keys to values.
        cli_args: CLI arguments.

    Returns:
        Metric -> value.
    """
    with importing():
        from axolotl.common.datasets import check_given_rows, load_datasets, load_preference_datasets
        from axolotl.evaluate import check_trained_result, evaluate
        from axolotl.integrations.base import PluginManager

    check_accelerate_default_config()
    check_trained_result(cfg)
    dataset_meta = PluginManager.get_instance().load_datasets(cfg, preprocess=False)
    if dataset_meta is None:
        load = load_preference_datasets if cfg.rl else load_datasets
        dataset_meta = load(cfg=cfg, cli_args=cli_args)
    else:
        check_given_rows(cfg=cfg, dataset_meta=dataset_meta)
    return evaluate(cfg=cfg, dataset_meta=dataset_meta)


if __name__ == "__main__":
    from axolotl.cli.main import run_module

    run_module("evaluate")
