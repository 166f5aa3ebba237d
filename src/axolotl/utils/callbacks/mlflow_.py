"""MLflow: the server is checked early, the config is uploaded, the run there ends as ours does."""

from __future__ import annotations

from axolotl.exceptions import TrackerError
from axolotl.utils.callbacks.save_config import SaveConfigCallback
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.redact import redact_secrets

LOG = get_logger(__name__)

STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
SECONDS_TO_ANSWER = 10


class SaveAxolotlConfigtoMlflowCallback(SaveConfigCallback):
    """Callback to save axolotl config to MLflow.

    Args:
        axolotl_config_path: the file to upload, with its secrets already removed.
    """

    def upload(self) -> None:
        import mlflow

        if mlflow.active_run() is not None:
            mlflow.log_artifact(self.axolotl_config_path, artifact_path="")
            LOG.info("The config was saved to MLflow.")

    def is_running(self) -> bool:
        """Whether the process has a run."""
        import mlflow

        return mlflow.active_run() is not None

    def end_run(self, outcome: str) -> None:
        """Give the run its status. That of a run which was ended as finished before the outcome was known is corrected."""
        import mlflow

        if mlflow.active_run() is not None:
            mlflow.end_run(STATUS[outcome])
        elif outcome != "finished" and (run := mlflow.last_active_run()) is not None:
            mlflow.MlflowClient().set_terminated(run.info.run_id, STATUS[outcome])


def check_server(cfg: DictDefault) -> None:
    """Raise TrackerError if runs cannot be kept at `mlflow_tracking_uri`: a server that does not answer, a database that cannot
    be opened. Of a server, any answer will do.
    """
    import mlflow
    import requests

    uri = mlflow.get_tracking_uri()
    try:
        if uri.startswith(("http://", "https://")):
            requests.get(uri, timeout=SECONDS_TO_ANSWER)
        elif not uri.startswith(("databricks", "uc")):
            mlflow.MlflowClient().search_experiments(max_results=1)
    except Exception as error:
        raise TrackerError(
            f"`mlflow_tracking_uri: {redact_secrets(uri)}` cannot be used: {redact_secrets(str(error))}. Start the server, or "
            "write a place on this machine, such as `mlflow_tracking_uri: sqlite:///mlflow.db`."
        ) from error
