"""The load of the machine while a step runs: MLflow's collectors, logged the way a step logs.

MLflow's own monitor asks the server at each sample, and ends for good at the first one that gets
no answer; a step that ends waits for it. This one only fills the step's spool.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from mlflow.environment_variables import (
    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING,
    MLFLOW_SYSTEM_METRICS_NODE_ID,
    MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING,
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL,
)
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

PREFIX = "system/"
"""Under it MLflow shows them on a tab of their own."""
SECONDS_BETWEEN_SAMPLES = 5.0
SHORTEST_SECONDS = 1.0
"""Of a shorter time a load says nothing."""
LEAVING_SECONDS = 1.0
"""A step that ends waits so long for the last sample, where the machine is slow to give it."""

LogSample = Callable[[int, Mapping[str, float]], None]
"""Takes the number of a sample, and what it found."""


@contextmanager
def system_metrics(log: LogSample) -> Iterator[None]:
    """Log the load of the machine inside the context, unless MLflow's variables say not to."""
    if not wanted():
        yield
        return
    over = threading.Event()
    sampler = threading.Thread(target=_sample, args=(log, over), name="system-metrics", daemon=True)
    sampler.start()
    try:
        yield
    finally:
        over.set()
        sampler.join(LEAVING_SECONDS)


def wanted() -> bool:
    """Whether to log them: yes, unless MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING says no."""
    switch = MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    return not switch.is_set() or bool(switch.get())


def _sample(log: LogSample, over: threading.Event) -> None:
    """Log a mean over some samples again and again, and what there is as it ends."""
    seconds = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or SECONDS_BETWEEN_SAMPLES
    samples = MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING.get() or 1
    collectors = _collectors()
    # The first one counts from nowhere.
    _collect(collectors)
    _clear(collectors)
    logged, taken, since = 0, 0, time.monotonic()
    while True:
        ends = over.wait(seconds)
        if ends and (time.monotonic() - since < SHORTEST_SECONDS):
            return
        _collect(collectors)
        taken += 1
        if ends or taken == samples:
            log(logged, _found(collectors))
            _clear(collectors)
            logged, taken, since = logged + 1, 0, time.monotonic()
        if ends:
            return


def _collectors() -> list[Any]:
    collectors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    # Without an NVIDIA GPU, or the package that asks it.
    with suppress(ImportError, RuntimeError):
        collectors.append(GPUMonitor())
    return collectors


def _collect(collectors: list[Any]) -> None:
    for collector in collectors:
        # What can't be had just now, as a disk that is unmounted, is left out.
        with suppress(Exception):
            collector.collect_metrics()


def _clear(collectors: list[Any]) -> None:
    for collector in collectors:
        collector.clear_metrics()


def _found(collectors: list[Any]) -> dict[str, float]:
    node = MLFLOW_SYSTEM_METRICS_NODE_ID.get()
    prefix = f"{PREFIX}{node}/" if node else PREFIX
    found = {
        f"{prefix}{name}": float(value)
        for collector in collectors
        for name, value in collector.aggregate_metrics().items()
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}
