"""The experiment trackers of a run: which there are, how they are checked, and that none of them can end a run.

A tracker that cannot start is an error before anything is trained. One that fails later is a warning: the run goes on, and
after a few failures in a row without it. When the run ends, each is told how: finished, interrupted or failed.
To add a tracker, write a row in `TRACKERS`.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from axolotl.exceptions import AxolotlError, MissingExtraError, TrackerError
from axolotl.utils.callbacks import comet_, mlflow_, opentelemetry, swanlab_, trackio_, wandb_
from axolotl.utils.callbacks.save_config import SaveConfigCallback, TrackerCallback
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from axolotl.utils.redact import redact_command, redact_secrets

LOG = get_logger(__name__)

# Failures in a row after which a tracker is left alone: each may have waited for a timeout.
MAX_FAILURES = 3


@dataclass(frozen=True)
class Tracker:
    """One experiment tracker.

    Attributes:
        switch: key that turns it on.
        title: its name in messages.
        report_to: its name for transformers, whose callback reports to it; None where one of ours does.
        packages: import names, each with alternatives: one of every group must be installed.
        extra: extra of this package that installs them.
        callbacks: names of the callback classes that report to it. The last is a `TrackerCallback`.
        saves_config: made with the path of the saved config, and added to the callbacks of the run.
        run_names: keys that may hold the name of the run.
        check: raises an AxolotlError when it cannot start with this config. Called on the first process, early.
    """

    switch: str
    title: str
    report_to: str | None
    packages: tuple[tuple[str, ...], ...]
    extra: str
    callbacks: tuple[str, ...]
    saves_config: type[SaveConfigCallback] | None = None
    run_names: tuple[str, ...] = ()
    check: Callable[[DictDefault], None] | None = None


TRACKERS: tuple[Tracker, ...] = (
    Tracker(
        switch="use_wandb",
        title="Weights & Biases",
        report_to="wandb",
        packages=(("wandb",),),
        extra="wandb",
        callbacks=("WandbCallback", "SaveAxolotlConfigtoWandBCallback"),
        saves_config=wandb_.SaveAxolotlConfigtoWandBCallback,
        run_names=("wandb_name", "wandb_run_id"),
        check=wandb_.check_login,
    ),
    Tracker(
        switch="use_mlflow",
        title="MLflow",
        report_to="mlflow",
        packages=(("mlflow",),),
        extra="mlflow",
        callbacks=("MLflowCallback", "SaveAxolotlConfigtoMlflowCallback"),
        saves_config=mlflow_.SaveAxolotlConfigtoMlflowCallback,
        run_names=("mlflow_run_name",),
        check=mlflow_.check_server,
    ),
    Tracker(
        switch="use_tensorboard",
        title="TensorBoard",
        report_to="tensorboard",
        packages=(("tensorboard", "tensorboardX"),),
        extra="tensorboard",
        callbacks=("TensorBoardCallback", "SaveAxolotlConfigtoTensorBoardCallback"),
    ),
    Tracker(
        switch="use_comet",
        title="Comet",
        report_to="comet_ml",
        packages=(("comet_ml",),),
        extra="comet",
        callbacks=("CometCallback", "SaveAxolotlConfigtoCometCallback"),
        saves_config=comet_.SaveAxolotlConfigtoCometCallback,
        run_names=("comet_experiment_key",),
        check=comet_.check_key,
    ),
    Tracker(
        switch="use_trackio",
        title="Trackio",
        report_to="trackio",
        packages=(("trackio",),),
        extra="trackio",
        callbacks=("TrackioCallback", "SaveAxolotlConfigtoTrackioCallback"),
        saves_config=trackio_.SaveAxolotlConfigtoTrackioCallback,
        run_names=("trackio_run_name",),
    ),
    Tracker(
        switch="use_swanlab",
        title="SwanLab",
        report_to=None,
        packages=(("swanlab",),),
        extra="swanlab",
        callbacks=("SwanLabReportCallback",),
        check=swanlab_.check_login,
    ),
    Tracker(
        switch="use_otel_metrics",
        title="The Prometheus endpoint",
        report_to=None,
        packages=(("opentelemetry.sdk",), ("opentelemetry.exporter.prometheus",), ("prometheus_client",)),
        extra="otel",
        callbacks=("OpenTelemetryMetricsCallback",),
        check=opentelemetry.check_address,
    ),
)

EVENTS = tuple(name for name in dir(TrainerCallback) if name.startswith("on_"))


def trackers_of(cfg: DictDefault) -> list[Tracker]:
    """The trackers that a config turns on."""
    return [tracker for tracker in TRACKERS if cfg[tracker.switch]]


def check_trackers(cfg: DictDefault, *, is_main_process: bool = True) -> None:
    """Find out early whether the trackers can start.

    Args:
        cfg: the config.
        is_main_process: whether this is the process that reports. The others only look for packages.

    Raises:
        MissingExtraError: the package of a tracker is not installed.
        TrackerError: there is no login, or its server does not answer.
        ConfigError: an address cannot be listened on.
    """
    for tracker in trackers_of(cfg):
        for alternatives in tracker.packages:
            if not any(map(_is_installed, alternatives)):
                raise MissingExtraError(alternatives[0], tracker.extra, f"`{tracker.switch}: true`")
    if is_main_process:
        for tracker in trackers_of(cfg):
            if tracker.check is not None:
                tracker.check(cfg)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


class TrackerGuard:
    """Stands between a run and one tracker.

    Args:
        tracker: the tracker.
        run_name: the name of its run; None takes that of the training arguments.
    """

    def __init__(self, tracker: Tracker, run_name: str | None = None):
        self.tracker = tracker
        self.run_name = run_name
        self.num_failures = 0
        self.ours: TrackerCallback | None = None
        self.owns_run = False
        self.ended = False
        self.seen = False  # an event was seen: the first of an evaluation alone is no beginning of training
        self.warned = False

    @property
    def given_up(self) -> bool:
        return self.num_failures >= MAX_FAILURES

    def watch(self, callback: TrainerCallback) -> None:
        """Put the guard in front of every event of a callback. The callback stays the object it is."""
        if isinstance(callback, TrackerCallback):
            self.ours = callback
        for event in EVENTS:
            if getattr(type(callback), event) is not getattr(TrainerCallback, event):
                setattr(callback, event, self._guarded(event, getattr(callback, event)))

    def _guarded(self, event: str, handle: Callable[..., Any]) -> Callable[..., Any]:
        start = event == "on_train_begin"

        def guarded(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if self.given_up or (self.ended and not start):
                return None
            if self.run_name is not None:
                args = copy.copy(args)
                args.run_name = self.run_name
            if start or not self.seen:
                self._see_who_began(state)
            try:
                with redacted_command_line():
                    result = handle(args, state, control, **kwargs)
            except Exception as error:
                if start:
                    raise self._cannot_start(error) from error
                self._count_failure(error)
                return None
            self.num_failures = 0
            return result

        return guarded

    def end_run(self, outcome: str) -> None:
        """Tell the tracker how the run ended, if it is this run that began the tracker's."""
        if self.ours is None or not self.owns_run:
            return
        self.owns_run, self.ended = False, True
        try:
            self.ours.end_run(outcome)
        except Exception as error:  # noqa: BLE001 - a tracker must not end a run
            self._count_failure(error)

    def _see_who_began(self, state: Any) -> None:
        self.ended, self.seen = False, True
        if state.is_world_process_zero and self.ours is not None and not self.owns_run:
            self.owns_run = not self.ours.is_running()

    def _cannot_start(self, error: Exception) -> AxolotlError:
        if isinstance(error, AxolotlError):
            return error
        return TrackerError(
            f"{self.tracker.title} cannot be started: {_describe(error)}. Mend it, or write `{self.tracker.switch}: false`."
        )

    def _count_failure(self, error: Exception) -> None:
        self.num_failures += 1
        if not self.warned:
            self.warned = True
            LOG.warning(
                f"{self.tracker.title} failed: {_describe(error)}. The training goes on; some figures may be missing there."
            )
        if self.given_up:
            LOG.warning(
                f"{self.tracker.title} failed {MAX_FAILURES} times in a row: the rest of the run is not reported to it."
            )


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {redact_secrets(lines[0].rstrip('. '))}"


@contextmanager
def redacted_command_line() -> Iterator[None]:
    """Trackers upload the command line; within, it holds no secrets."""
    written = sys.argv
    sys.argv = redact_command(written)
    try:
        yield
    finally:
        sys.argv = written


def guard_trackers(cfg: DictDefault, callbacks: Iterable[TrainerCallback]) -> list[TrackerGuard]:
    """Put guards in front of the callbacks of all trackers that the config turns on."""
    guards, callbacks = [], list(callbacks)
    for tracker in trackers_of(cfg):
        guard = TrackerGuard(tracker, next((str(cfg[key]) for key in tracker.run_names if cfg[key]), None))
        for callback in callbacks:
            if type(callback).__name__ in tracker.callbacks:
                guard.watch(callback)
        guards.append(guard)
    return guards


class RunOutcome(TrainerCallback):
    """Keeps the guards of a run with its trainer, to end what they began."""

    def __init__(self, guards: list[TrackerGuard]):
        self.guards = guards

    def end(self, outcome: str) -> None:
        """End the runs of all trackers. Safe to call twice."""
        for guard in self.guards:
            guard.end_run(outcome)
