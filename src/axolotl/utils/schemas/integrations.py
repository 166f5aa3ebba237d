"""Tracking services, LISA, Ray and the Gradio interface."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import model_validator

from axolotl.utils.logging import get_logger
from axolotl.utils.schemas.fields import IGNORE_CASE, Float, Int, Text, Words, key

LOG = get_logger(__name__)


class WandbConfig(Words):
    """Weights & Biases."""

    use_wandb: bool | None = key("Report to Weights & Biases. Set when `wandb_project` is.")
    wandb_name: Text | None = key("Name of the run.")
    wandb_run_id: Text | None = key("Id of the run, to continue it.")
    wandb_mode: Annotated[Literal["online", "offline", "shared", "disabled", "dryrun"] | None, IGNORE_CASE] = key(
        "`offline` keeps the run on this machine, `disabled` turns it off."
    )
    wandb_project: Text | None = key("Project of the run.")
    wandb_entity: Text | None = key("Team or user of the run.")
    wandb_watch: str | bool | None = key(
        "Histograms of the model to record: `gradients` (also `true`), `parameters`, `all` or `false`."
    )
    wandb_log_model: str | bool | None = key("When to upload the model: `checkpoint`, `end` or `false`.")

    @model_validator(mode="before")
    @classmethod
    def a_run_id_names_the_run(cls, data: Any) -> Any:
        """`wandb_run_id` alone also becomes `wandb_name`."""
        if isinstance(data, dict) and data.get("wandb_run_id") and not data.get("wandb_name"):
            LOG.warning_once(
                "`wandb_run_id` is also used as `wandb_name`. To name the run otherwise, set `wandb_name`."
            )
            return {**data, "wandb_name": data["wandb_run_id"]}
        return data


class MLFlowConfig(Words):
    """MLflow."""

    use_mlflow: bool | None = key("Report to MLflow.")
    mlflow_tracking_uri: str | None = key("Address of the MLflow server.")
    mlflow_experiment_name: Text | None = key("Name of the experiment.")
    mlflow_run_name: Text | None = key("Name of the run.")
    hf_mlflow_log_artifacts: bool | None = key("Copy every checkpoint to MLflow.")


class CometConfig(Words):
    """Comet."""

    use_comet: bool | None = key("Report to Comet.")
    comet_api_key: str | None = key("Secret key. Better run `comet login` or set COMET_API_KEY.")
    comet_workspace: Text | None = key("Workspace of the experiment.")
    comet_project_name: Text | None = key("Project of the experiment.")
    comet_experiment_key: Text | None = key("Id of the experiment, to continue it.")
    comet_mode: Annotated[Literal["get_or_create", "create", "get"] | None, IGNORE_CASE] = key(
        "Start a new experiment, continue one, or decide by what exists."
    )
    comet_online: bool | None = key("Send data to the server; false keeps it on this machine.")
    comet_experiment_config: dict[str, Any] | None = key("Further settings of the experiment.")


class TrackioConfig(Words):
    """Trackio."""

    use_trackio: bool | None = key("Report to Trackio.")
    trackio_project_name: Text | None = key("Project of the run.")
    trackio_run_name: Text | None = key("Name of the run.")
    trackio_space_id: Text | None = key("Hugging Face space to show the run in.")


class OpenTelemetryConfig(Words):
    """OpenTelemetry metrics, for Prometheus."""

    use_otel_metrics: bool | None = key("Serve metrics for Prometheus.", False)
    otel_metrics_host: str | None = key("Host to serve metrics on.", "localhost")
    otel_metrics_port: Int | None = key("Port to serve metrics on.", 8000)


class LISAConfig(Words):
    """LISA: train a few random layers at a time."""

    lisa_n_layers: Int | None = key("Layers trained at a time.", ge=1)
    lisa_step_interval: Int | None = key("Optimizer steps between switches of layers.", ge=1)
    lisa_layers_attribute: str | None = key("Where the layers are in the model.", "model.layers")


class GradioConfig(Words):
    """The web interface of `axolotl inference --gradio`."""

    gradio_title: str | None = key("Title of the page.")
    gradio_share: bool | None = key("Make the page public through Gradio.")
    gradio_server_name: str | None = key("Host to serve on.")
    gradio_server_port: Int | None = key("Port to serve on.")
    gradio_max_new_tokens: Int | None = key("Longest answer, in tokens.", ge=1)
    gradio_temperature: Float | None = key("Sampling temperature.", ge=0)


class RayConfig(Words):
    """Ray Train."""

    use_ray: bool = key("Launch with Ray Train.", False)
    ray_run_name: Text | None = key("Name of the run.")
    ray_num_workers: Int = key("Workers; one per GPU.", 1, ge=1)
    resources_per_worker: dict[str, Any] = key("What each worker needs.", {"GPU": 1})
