"""Generated samples as a table or text in the trackers of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.integrations import TensorBoardCallback

COLUMNS = ("id", "Prompt", "Correct Completion", "Predicted Completion (model.generate)")


@dataclass(frozen=True)
class Sample:
    """One answer of the model.

    Args:
        prompt: what the model read.
        generated: what it wrote.
        reference: what the row says.
    """

    prompt: str
    generated: str
    reference: str

    def as_dict(self, state: Any) -> dict[str, Any]:
        """A line of the file: the sample, with step and epoch."""
        return {
            "step": state.global_step,
            "epoch": state.epoch,
            "prompt": self.prompt,
            "generated": self.generated,
            "reference": self.reference,
        }


def log_samples(trainer: Any, name: str, samples: list[Sample], state: Any) -> None:
    """Hand samples to every tracker that the run reports to. Called on the first rank."""
    for tracker, log in TRACKERS.items():
        if tracker in trainer.args.report_to:
            log(trainer, name, samples, state)


def as_text(samples: list[Sample]) -> str:
    """Samples as Markdown."""
    parts = [
        f"### {number}\n\n**Prompt**\n\n{_indented(sample.prompt)}\n\n**Generated**\n\n{_indented(sample.generated)}\n\n"
        f"**Reference**\n\n{_indented(sample.reference)}"
        for number, sample in enumerate(samples, 1)
    ]
    return "\n\n".join(parts) + "\n"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _to_wandb(trainer: Any, name: str, samples: list[Sample], state: Any) -> None:
    import wandb

    if wandb.run is None:
        return
    rows: list[Any] = [[number, s.prompt, s.reference, s.generated] for number, s in enumerate(samples)]
    wandb.log({name: wandb.Table(columns=list(COLUMNS), data=rows), "train/global_step": state.global_step})


def _to_mlflow(trainer: Any, name: str, samples: list[Sample], state: Any) -> None:
    import mlflow

    if mlflow.active_run() is not None:
        mlflow.log_text(as_text(samples), f"{name}/step-{state.global_step}.md")


def _to_tensorboard(trainer: Any, name: str, samples: list[Sample], state: Any) -> None:
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(name, as_text(samples), state.global_step)


def _to_comet(trainer: Any, name: str, samples: list[Sample], state: Any) -> None:
    import comet_ml

    experiment = comet_ml.get_running_experiment()
    if experiment is not None:
        experiment.log_text(as_text(samples), step=state.global_step, metadata={"name": name})


def _to_trackio(trainer: Any, name: str, samples: list[Sample], state: Any) -> None:
    import trackio

    if trackio.context_vars.current_run.get() is None:
        return
    rows = [[number, s.prompt, s.reference, s.generated] for number, s in enumerate(samples)]
    trackio.log({name: trackio.Table(columns=list(COLUMNS), data=rows), "train/global_step": state.global_step})


# Name that transformers gives a tracker -> how it takes samples.
TRACKERS = {
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
    "tensorboard": _to_tensorboard,
    "comet_ml": _to_comet,
    "trackio": _to_trackio,
}
