"""Keys of the swanlab plugin."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import model_validator

from axolotl.utils.schemas.fields import IGNORE_CASE, Int, Text, Words, key


class SwanLabConfig(Words):
    """Report to SwanLab."""

    use_swanlab: bool | None = key("Report to SwanLab.", True)
    swanlab_project: Text | None = key("Project of the experiment.")
    swanlab_experiment_name: Text | None = key("Name of the experiment.")
    swanlab_description: str | None = key("Description of the experiment.")
    swanlab_mode: Annotated[Literal["cloud", "local", "offline", "disabled"] | None, IGNORE_CASE] = key(
        "Where data goes."
    )
    swanlab_workspace: Text | None = key("Workspace of the experiment.")
    swanlab_api_key: str | None = key("Secret key. Better set SWANLAB_API_KEY.")
    swanlab_log_model: bool | None = key("Upload the model.", False)
    swanlab_web_host: str | None = key("Address of a private server's pages.")
    swanlab_api_host: str | None = key("Address of a private server.")
    swanlab_lark_webhook_url: str | None = key("Lark address that is told about the run.")
    swanlab_lark_secret: str | None = key("Secret of that address.")
    swanlab_log_completions: bool | None = key("Log generated answers.", True)
    swanlab_completion_log_interval: Int | None = key("Optimizer steps between them.", 100, ge=1)
    swanlab_completion_max_buffer: Int | None = key("Answers kept until they are logged.", 128, ge=1)

    @model_validator(mode="before")
    @classmethod
    def needs_a_project(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("use_swanlab", True):
            project = data.get("swanlab_project")
            if project is None or not str(project).strip():
                raise ValueError("The swanlab plugin needs `swanlab_project`. Write its name, or `use_swanlab: false`.")
        return data
