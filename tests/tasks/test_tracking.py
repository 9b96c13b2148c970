"""Tests of tasks.tracking on a real SQLite store."""

import pytest
from mlflow import MlflowClient

from tasks import tracking


def test_an_interrupted_step_is_killed_and_keeps_its_metrics(run: tracking.PipelineRun) -> None:
    opened: list[str] = []

    def interrupted() -> None:
        with tracking.step_run(run, "rl", {}) as tracked:
            opened.append(tracked.run_id)
            tracked.log(128, {"objective/kl": 0.5})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    found = MlflowClient().get_run(opened[0])
    assert found.info.status == "KILLED"
    assert found.data.metrics == {"objective/kl": 0.5}


def test_metrics_are_written_in_batches_and_none_is_lost(run: tracking.PipelineRun) -> None:
    with tracking.step_run(run, "rl", {}) as tracked:
        for step in range(2 * tracking.BUFFERED_POINTS + 3):
            tracked.log(step, {"a": step, "b": -step})
    history = MlflowClient().get_metric_history(tracked.run_id, "b")
    assert [(point.step, point.value) for point in history] == [
        (step, -step) for step in range(2 * tracking.BUFFERED_POINTS + 3)
    ]


def test_a_warning_stands_in_the_log_and_on_the_run(
    run: tracking.PipelineRun,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with tracking.step_run(run, "rl", {}) as tracked:
        tracked.warn(512, "kl_runaway", "the KL is 40 nats; raise rl.kl_coef")

    tags = MlflowClient().get_run(tracked.run_id).data.tags
    assert tags["warning.kl_runaway"] == "512: the KL is 40 nats; raise rl.kl_coef"
    assert "kl_runaway: the KL is 40 nats; raise rl.kl_coef (rl 512)" in caplog.text
    assert "rl 512: kl_runaway: the KL is 40 nats; raise rl.kl_coef" in capsys.readouterr().err
    assert tracked.warnings == 1
