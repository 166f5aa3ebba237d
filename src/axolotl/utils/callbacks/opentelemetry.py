"""OpenTelemetry metrics of a run, served over HTTP for Prometheus to scrape.

Prometheus comes and reads; nothing is sent. The endpoint lives as long as the training does.
"""

from __future__ import annotations

import math
import numbers
import re
import socket
from typing import Any

from axolotl.exceptions import ConfigError
from axolotl.utils.callbacks.save_config import TrackerCallback
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

LOG = get_logger(__name__)

DEFAULT_HOST = "localhost"
DEFAULT_PORT = 8000
PREFIX = "axolotl_"
# Names that would say too little.
NAMES = {"loss": "train_loss", "ppl": "train_ppl"}


class OpenTelemetryMetricsCallback(TrackerCallback):
    """Serves every figure of the log lines as a gauge at `http://host:port/metrics`, from the first process.

    Args:
        cfg: `otel_metrics_host` and `otel_metrics_port` are read. Port 0 takes any free one.
    """

    def __init__(self, cfg: DictDefault):
        self.host, self.port = read_address(cfg)
        self.gauges: dict[str, Any] = {}
        self.provider: Any = None
        self.meter: Any = None
        self.server: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.start()
        self.set("max_steps", state.max_steps)
        self.set("world_size", args.world_size)
        self._set_progress(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._set_progress(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._set_progress(state)
        for key, value in (logs or {}).items():
            if isinstance(value, numbers.Real) and not isinstance(value, bool):
                self.set(metric_name(key), float(value))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def is_running(self) -> bool:
        return self.server is not None

    def end_run(self, outcome: str) -> None:
        self.stop()

    def start(self) -> None:
        """Open the endpoint.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from opentelemetry.sdk.metrics import MeterProvider
        from prometheus_client import start_http_server

        if self.server is not None:
            return
        try:
            self.server, _ = start_http_server(self.port, addr=self.host)
        except OSError as error:
            raise _address_error(self.host, self.port, error) from error
        self.port = self.server.server_port
        # A provider of its own: that of the process, if there is one, belongs to somebody else.
        self.provider = MeterProvider(metric_readers=[PrometheusMetricReader()])
        self.meter = self.provider.get_meter("axolotl")
        LOG.info(f"Metrics for Prometheus: http://{self.host}:{self.port}/metrics")

    def set(self, name: str, value: float) -> None:
        """Give a gauge its value. Does nothing while the endpoint is closed."""
        if self.meter is None:
            return
        if name not in self.gauges:
            self.gauges[name] = self.meter.create_gauge(PREFIX + name, description=f"`{name}` of the training run")
        self.gauges[name].set(value)

    def stop(self) -> None:
        """Close the endpoint. Safe to call twice."""
        if self.server is None:
            return
        self.server.shutdown()
        self.server.server_close()
        self.provider.shutdown()
        self.server = self.provider = self.meter = None
        self.gauges.clear()

    def _set_progress(self, state: Any) -> None:
        self.set("global_step", state.global_step)
        if state.epoch is not None and math.isfinite(state.epoch):
            self.set("epoch", state.epoch)


def metric_name(key: str) -> str:
    """`memory/max_active (GiB)` -> `memory_max_active_gib`; `loss` -> `train_loss`."""
    return NAMES.get(key) or re.sub(r"[^a-z0-9]+", "_", key.lower()).strip("_")


def read_address(cfg: DictDefault) -> tuple[str, int]:
    """(host, port) to serve on."""
    port = cfg.otel_metrics_port
    return cfg.otel_metrics_host or DEFAULT_HOST, DEFAULT_PORT if port is None else port


def check_address(cfg: DictDefault) -> None:
    """Raise ConfigError if `otel_metrics_host` and `otel_metrics_port` cannot be listened on."""
    host, port = read_address(cfg)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server does: a port that was in use a minute ago is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        raise _address_error(host, port, error) from error


def _address_error(host: str, port: int, error: Exception) -> ConfigError:
    return ConfigError(
        f"`otel_metrics_host: {host}` with `otel_metrics_port: {port}` cannot be listened on: {error}. Write another port, or "
        "`otel_metrics_port: 0` for any free one."
    )
