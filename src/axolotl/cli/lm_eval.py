"""CLI to evaluate a model with the lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.cli.config import read_cfg
from axolotl.exceptions import ConfigError

PLUGIN = "axolotl.integrations.lm_eval.LMEvalPlugin"


def do_cli(config: Path | str, **kwargs: Any) -> None:
    """Evaluate the model that a config trains, or that its `lm_eval_model` names.

    Args:
        config: path of a config. It may have the keys of the harness only.
        kwargs: overrides of its keys.
    """
    from pydantic import ValidationError

    from axolotl.integrations.base import load_plugin
    from axolotl.utils.schemas.errors import explain

    cfg, _ = read_cfg(config, **kwargs)
    plugin: Any = load_plugin(PLUGIN)
    try:
        plugin.evaluate(cfg)
    except ValidationError as error:
        raise ConfigError(explain(error, cfg)) from error


if __name__ == "__main__":
    from axolotl.cli.main import run_module

    run_module("lm-eval")
