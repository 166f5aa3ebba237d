"""The lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a trained model, in a process of its own.

In: which model, which tasks. Out: `<output_dir>/lm_eval_results/<time>`, as the harness writes it. A process of its own has all
of the GPU's memory, and nothing that this one has changed.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from axolotl.exceptions import AxolotlError, ConfigError, MissingExtraError
from axolotl.run.children import run_child
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

DEFAULT_BATCH_SIZE = 8
RESULTS = "lm_eval_results"

# What launchers tell their processes: the harness would wait for the others of a group.
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_")  # fmt: skip


def check_harness() -> None:
    """Raise MissingExtraError if the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm_eval", "lm-eval", "the lm_eval plugin")


def group_tasks(tasks: Iterable[str]) -> dict[int | None, list[str]]:
    """Tasks by their number of examples: `arc_challenge:25` has 25, and without a number the task decides."""
    groups: dict[int | None, list[str]] = {}
    for task in tasks:
        name, _, number = task.rpartition(":")
        few_shot, name = (int(number), name) if name and number.isdigit() else (None, task)
        groups.setdefault(few_shot, []).append(name)
    return groups


def read_model_args(cfg: DictDefault) -> dict[str, Any]:
    """What the harness is to load: `lm_eval_model`, else what the run wrote to `output_dir`, else `hub_model_id`.

    Raises:
        ConfigError: there is none of these.
    """
    arguments: dict[str, Any] = {}
    output_dir = Path(cfg.output_dir or "./model-out")
    if cfg.lm_eval_model:
        arguments["pretrained"] = cfg.lm_eval_model
    elif (output_dir / "adapter_config.json").is_file():
        base = json.loads((output_dir / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        arguments |= {"pretrained": cfg.base_model or base, "peft": str(output_dir)}
        if (output_dir / "tokenizer_config.json").is_file():
            arguments["tokenizer"] = str(output_dir)  # the harness grows the embeddings to it
        arguments |= {key: True for key in ("load_in_4bit", "load_in_8bit") if cfg[key]}
    elif (output_dir / "config.json").is_file():
        arguments["pretrained"] = str(output_dir)
    elif cfg.hub_model_id:
        arguments["pretrained"] = cfg.hub_model_id
    else:
        raise ConfigError(
            f"There is no model to evaluate: `output_dir: {output_dir}` has none, and neither `lm_eval_model` nor `hub_model_id` is set."
        )
    half = {"bfloat16": (cfg.bf16, cfg.bfloat16), "float16": (cfg.fp16, cfg.float16)}
    arguments["dtype"] = next(
        (name for name, keys in half.items() if any(key in (True, "full") for key in keys)), "auto"
    )
    if cfg.trust_remote_code:
        arguments["trust_remote_code"] = True
    return arguments


def build_commands(cfg: DictDefault) -> list[list[str]]:
    """The command lines of the harness: one for each number of examples."""
    import torch

    output = Path(cfg.output_dir or "./model-out") / RESULTS / datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
    command = [sys.executable, "-m", "axolotl.run.watched", "lm_eval"]
    command += ["--model", "hf", "--model_args", json.dumps(read_model_args(cfg))]
    command += ["--batch_size", str(cfg.lm_eval_batch_size or DEFAULT_BATCH_SIZE), "--output_path", str(output)]
    if not torch.cuda.is_available():
        command += ["--device", "cpu"]
    if cfg.trust_remote_code:
        command += ["--trust_remote_code"]
    if cfg.use_wandb and cfg.wandb_project:
        wandb = {"project": cfg.wandb_project, "entity": cfg.wandb_entity, "name": cfg.wandb_name}
        command += ["--wandb_args", ",".join(f"{key}={value}" for key, value in wandb.items() if value)]
    commands = []
    for few_shot, names in group_tasks(cfg.lm_eval_tasks or []).items():
        examples = [] if few_shot is None else ["--num_fewshot", str(few_shot)]
        commands.append([*command, "--tasks", ",".join(names), *examples])
    return commands


def evaluate_with_harness(cfg: DictDefault) -> None:
    """Run the harness, and wait for it.

    Raises:
        MissingExtraError: it is not installed.
        ConfigError: there is no model, or no task.
        AxolotlError: it failed.
        SystemExit: a signal ended it, and so this process.
    """
    check_harness()
    commands = build_commands(cfg)
    if not commands:
        raise ConfigError("The lm_eval plugin has nothing to evaluate. Write tasks, such as `lm_eval_tasks: [gsm8k]`.")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_VARIABLES)}
    for command in commands:
        LOG.info("running: %s", " ".join(command[3:]))
        code = run_child(command, env=environment)
        if code:
            raise AxolotlError(
                f"The lm-evaluation-harness failed with exit code {code}; what it said is above. The model is not touched: "
                "`axolotl lm-eval` with this config evaluates it again."
            )
