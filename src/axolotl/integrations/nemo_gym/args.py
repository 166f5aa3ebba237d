"""Keys of the nemo_gym plugin."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from axolotl.utils.schemas.fields import Int, Words, key


class NemoGymArgs(Words):
    """Reinforcement learning in the environments of NVIDIA NeMo Gym."""

    nemo_gym_enabled: bool | None = key("Use NeMo Gym.", True)
    nemo_gym_dir: str | None = key("Folder of NeMo Gym.")
    nemo_gym_auto_clone: bool | None = key("Fetch NeMo Gym if it is not there.")
    nemo_gym_config_paths: list[str] | None = key("Configs of the environments.")
    nemo_gym_head_port: Int | None = key("Port of the head server.", 11000)
    nemo_gym_server_timeout: Int | None = key("Seconds to wait for servers to start.", 360, ge=1)
    nemo_gym_verify_timeout: Int | None = key("Seconds to wait for a reward.", 30, ge=1)
    nemo_gym_run_timeout: Int | None = key("Seconds to wait for an episode.", 300, ge=1)
    nemo_gym_datasets: list[dict[str, Any]] | None = key("Datasets of the environments.")
    nemo_gym_auto_start: bool | None = key("Start the servers.", True)
    nemo_gym_model_name: str | None = key("Name of the model for the servers.")
    nemo_gym_multi_turn: bool | None = key("Episodes of several turns.")
    nemo_gym_max_turns: Int | None = key("Most turns of an episode.", ge=1)

    @model_validator(mode="before")
    @classmethod
    def enabled_needs_environments_and_datasets(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data.get("nemo_gym_enabled", True):
            return data
        if data.get("nemo_gym_auto_start", True) and not data.get("nemo_gym_config_paths"):
            raise ValueError("The nemo_gym plugin needs `nemo_gym_config_paths`, or `nemo_gym_auto_start: false`.")
        if not data.get("nemo_gym_datasets"):
            raise ValueError("The nemo_gym plugin needs `nemo_gym_datasets`.")
        return data
