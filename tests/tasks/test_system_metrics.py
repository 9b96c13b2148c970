"""Tests of tasks.system_metrics: what is logged, how often, and what is left behind."""

import threading
import time
from collections.abc import Mapping

import pytest
from mlflow import MlflowClient

from tasks import system_metrics as module
from tasks import tracking
from tasks.system_metrics import system_metrics

CPU = "system/cpu_utilization_percentage"


class Samples:
    """Takes samples."""

    def __init__(self) -> None:
        self.got: list[tuple[int, Mapping[str, float]]] = []

    def __call__(self, sample: int, metrics: Mapping[str, float]) -> None:
        self.got.append((sample, metrics))


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name == "system-metrics"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monkeypatch.delenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", raising=False)


def test_samples_are_numbered_and_no_thread_is_left() -> None:
    samples = Samples()
    deadline = time.monotonic() + 30
    with system_metrics(samples):
        assert threads()
        while len(samples.got) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert threads() == []
    assert [number for number, _ in samples.got] == list(range(len(samples.got)))
    assert len(samples.got) >= 3
    assert 0 <= samples.got[1][1][CPU] <= 100
    assert all(name.startswith("system/") for name in samples.got[0][1])


def test_a_short_step_logs_nothing_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "60")
    samples = Samples()
    began = time.monotonic()
    with system_metrics(samples):
        pass
    # It waits no longer than for the last sample, which there is none of.
    assert time.monotonic() - began < module.LEAVING_SECONDS
    assert samples.got == []


def test_what_is_left_is_logged_as_the_step_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "60")
    monkeypatch.setattr(module, "SHORTEST_SECONDS", 0.1)
    samples = Samples()
    with system_metrics(samples):
        time.sleep(0.6)
    assert len(samples.got) == 1


def test_mlflow_s_variable_switches_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    samples = Samples()
    with system_metrics(samples):
        assert threads() == []
        time.sleep(0.1)
    assert samples.got == []


def test_several_samples_make_one_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1000")
    samples = Samples()
    with system_metrics(samples):
        time.sleep(0.3)
    assert samples.got == []


def test_a_step_that_is_interrupted_leaves_no_thread_and_its_samples_in_mlflow(
    run: tracking.PipelineRun,
) -> None:
    opened: list[str] = []

    def interrupted() -> None:
        with tracking.step_run(run, "rl", {}) as tracked:
            opened.append(tracked.run_id)
            time.sleep(0.3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threads() == []
    points = MlflowClient().get_metric_history(opened[0], CPU)
    assert [point.step for point in points] == list(range(len(points)))
    assert points
