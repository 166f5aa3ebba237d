"""What has changed between the run that saved a checkpoint and the run that goes on from it, or begins in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from axolotl.core.checkpoint import SAVED_CONFIG, list_checkpoints, read_run_state, step_of

# Keys that do not change what is computed: where things go, how often something is said, how fast it runs.
NO_MATTER = frozenset(
    """output_dir resume_from_checkpoint auto_resume_from_checkpoints save_steps saves_per_epoch save_strategy save_total_limit
    save_first_step save_only_model async_save dynamic_checkpoint logging_steps eval_steps evals_per_epoch eval_strategy
    dataset_prepared_path dataset_num_proc dataset_processes dataloader_num_workers dataloader_pin_memory
    dataloader_prefetch_factor num_processes world_size local_rank device debug strict hub_strategy hub_model_id
    gc_steps gc_collect_steps include_tkps include_tokens_per_second profiler_steps profiler_steps_start
    non_finite_policy ddp_timeout""".split()  # noqa: SIM905 - a list of quoted words would take a page
)
NO_MATTER_PREFIXES = ("wandb_", "use_wandb", "mlflow_", "use_mlflow", "comet_", "use_comet", "use_tensorboard", "trackio_",
                      "use_trackio", "otel_", "use_otel", "ddp_")  # fmt: skip

# Keys whose values the optimizer and the scheduler bring along from the checkpoint.
KEPT = frozenset(
    """learning_rate weight_decay adam_beta1 adam_beta2 adam_beta3 adam_epsilon adam_epsilon2 embedding_lr embedding_lr_scale
    lr_groups loraplus_lr_ratio loraplus_lr_embedding optim_args""".split()  # noqa: SIM905 - a list of quoted words would take a page
)


def changes_since(checkpoint: str | Path, config_yaml: str, world_size: int) -> list[str]:
    """One sentence per difference that makes the resumed run another one than that of the checkpoint.

    Args:
        checkpoint: the folder to resume from.
        config_yaml: the resolved config of this run, as YAML.
        world_size: processes of this run.

    Returns:
        The sentences; empty when nothing changed, or the checkpoint does not say how it was made.
    """
    said = []
    state = read_run_state(checkpoint)
    before = state.get("world_size")
    if before and before != world_size:
        said.append(
            f"it was saved by {before} {_processes(before)}, this run has {world_size}: batches are cut in another way and random "
            "numbers differ, so that losses are not those of an uninterrupted run"
        )
    saved = Path(checkpoint) / SAVED_CONFIG
    if not saved.is_file():
        return said
    old, new = (_flat(yaml.safe_load(text) or {}) for text in (saved.read_text("utf-8"), config_yaml))
    for key in sorted(old.keys() | new.keys()):
        name = key.partition(".")[0].partition("[")[0]
        if old.get(key) == new.get(key) or name in NO_MATTER or name.startswith(NO_MATTER_PREFIXES):
            continue
        sentence = f"`{key}` was {_shown(old.get(key))} and is {_shown(new.get(key))}"
        if name in KEPT:
            sentence += ", but the optimizer and the scheduler go on with the value of the checkpoint"
        said.append(sentence)
    return said


def later_checkpoints(output_dir: str | Path, checkpoint: str | Path | None) -> str | None:
    """A sentence about checkpoints that this run, which begins before them, did not make; None when there are none.

    Args:
        output_dir: folder of the run.
        checkpoint: the one to resume from, or None.
    """
    start = 0 if checkpoint is None else step_of(checkpoint)
    later = [path for path in list_checkpoints(output_dir) if step_of(path) > start]
    if not later:
        return None
    names = later[-1].name if len(later) == 1 else f"{len(later)} checkpoints, the last of them {later[-1].name},"
    begins = "starts at the beginning" if checkpoint is None else f"goes on from {Path(checkpoint).name}"
    said = f"{output_dir} holds {names} of an earlier run. This one {begins}: it replaces what has the same step, and "
    said += "`save_total_limit` removes the oldest first."
    return said if checkpoint else f"{said} `auto_resume_from_checkpoints: true` would have gone on with that run."


def _processes(number: int) -> str:
    return "process" if number == 1 else "processes"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """`{"datasets[0].path": "a.jsonl"}` for nested mappings and lists."""
    if isinstance(value, dict):
        inner = {f"{path}.{key}" if path else str(key): item for key, item in value.items()}
    elif isinstance(value, list):
        inner = {f"{path}[{index}]": item for index, item in enumerate(value)}
    else:
        return {path: value}
    return {name: leaf for key, item in inner.items() for name, leaf in _flat(item, key).items()}


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
