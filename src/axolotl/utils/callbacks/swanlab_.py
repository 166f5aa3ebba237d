"""SwanLab: log lines, the config, the answers of online RL, and how the run ended."""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.integrations.integration_utils import rewrite_logs

from axolotl.exceptions import TrackerError
from axolotl.utils.callbacks.save_config import TrackerCallback
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

DEFAULT_INTERVAL = 100
DEFAULT_BUFFER = 128

# Keys that the library reads as variables.
VARIABLES = {
    "swanlab_api_key": "SWANLAB_API_KEY",
    "swanlab_api_host": "SWANLAB_API_HOST",
    "swanlab_web_host": "SWANLAB_WEB_HOST",
}

# How a run ended -> its state and the reason shown.
STATES = {"finished": ("success", None), "interrupted": ("aborted", None), "failed": ("crashed", "failed")}


class SwanLabReportCallback(TrackerCallback):
    """Reports to SwanLab: the log lines, the config, the answers of online RL.

    Args:
        cfg: the config; reads the `swanlab_*` keys.
        axolotl_config_path: the config to upload, with its secrets already removed.
    """

    def __init__(self, cfg: DictDefault, axolotl_config_path: str):
        self.cfg = cfg
        self.axolotl_config_path = str(axolotl_config_path)
        self.interval = cfg.swanlab_completion_log_interval or DEFAULT_INTERVAL
        self.answers: deque[tuple[str, str]] = deque(maxlen=cfg.swanlab_completion_max_buffer or DEFAULT_BUFFER)
        self._logged_at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.is_running():
            return
        import swanlab

        set_variables(self.cfg)
        config = yaml.safe_load(Path(self.axolotl_config_path).read_text(encoding="utf-8"))
        swanlab.init(**read_init_arguments(self.cfg), config={**args.to_sanitized_dict(), "axolotl_config": config})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.is_running():
            return
        import swanlab

        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        swanlab.log(rewrite_logs(numbers), step=state.global_step)
        if self.answers and state.global_step - self._logged_at >= self.interval:
            self._logged_at = state.global_step
            texts = [swanlab.Text(text, caption=caption) for text, caption in self.answers]
            swanlab.log({"completions": texts}, step=state.global_step)
            self.answers.clear()

    def take_answers(self, prompts: list[Any], completions: list[Any], rewards: Any, step: int) -> None:
        """Keep the answers of a batch, to be logged with the first log line after enough steps.

        Args:
            prompts: one per completion.
            completions: what the policy wrote.
            rewards: float tensor of shape (num_completions, num_reward_functions), or of one reward each.
            step: the optimizer step.
        """
        sums = torch.as_tensor(rewards).float().reshape(len(completions), -1).nansum(-1).tolist()
        for prompt, completion, reward in zip(prompts, completions, sums, strict=True):
            self.answers.append(
                (f"{_text_of(prompt)}\n\n---\n\n{_text_of(completion)}", f"step {step}, reward {reward:.4g}")
            )

    def is_running(self) -> bool:
        """Whether the process has a run."""
        import swanlab

        return swanlab.has_run()

    def end_run(self, outcome: str) -> None:
        """Finish the run. Its state is success, aborted or crashed."""
        import swanlab

        if swanlab.has_run():
            state, error = STATES[outcome]
            swanlab.finish(state=state, error=error)  # type: ignore[arg-type]


def _text_of(message: Any) -> str:
    """A prompt or an answer as text: it may be a conversation."""
    if isinstance(message, str):
        return message
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in message)


def read_init_arguments(cfg: DictDefault) -> dict[str, Any]:
    """The arguments of `swanlab.init` that the config decides."""
    arguments: dict[str, Any] = {
        "project": cfg.swanlab_project,
        "workspace": cfg.swanlab_workspace,
        "name": cfg.swanlab_experiment_name,
        "description": cfg.swanlab_description,
        "mode": cfg.swanlab_mode,
    }
    if cfg.swanlab_lark_webhook_url:
        from swanlab.plugin.notification import LarkCallback

        arguments["callbacks"] = [LarkCallback(cfg.swanlab_lark_webhook_url, cfg.swanlab_lark_secret, language="en")]
    return {name: value for name, value in arguments.items() if value is not None}


def set_variables(cfg: DictDefault) -> None:
    """Set the variables of the environment that stand for keys."""
    for key, variable in VARIABLES.items():
        if cfg[key]:
            os.environ[variable] = str(cfg[key])


def check_login(cfg: DictDefault) -> None:
    """Raise TrackerError if data is to be sent to SwanLab and there is no key, or shown here and the board is missing."""
    import swanlab

    set_variables(cfg)
    mode = cfg.swanlab_mode or os.environ.get("SWANLAB_MODE") or "cloud"
    if mode == "local" and importlib.util.find_spec("swanboard") is None:
        raise TrackerError(
            "`swanlab_mode: local` needs the board of SwanLab. Run `pip install swanlab[dashboard]`, or write `swanlab_mode: offline`."
        )
    if mode in ("cloud", "online") and not swanlab.Settings().api_key:
        raise TrackerError(
            "`use_swanlab: true` needs a key. Run `swanlab login`, set SWANLAB_API_KEY, or write `swanlab_mode: offline` to keep the "
            "experiment on this machine."
        )
