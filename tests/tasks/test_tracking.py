"""Tests of tasks.tracking on a real SQLite store."""

import json
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect.exceptions import TerminationSignal

from plumbline.errors import TrainingError
from plumbline.params.loader import flatten
from plumbline.params.schema import Experiment
from plumbline.process import alive, identity
from plumbline.refs import StepResult
from tasks import tracking
from tasks.delivery import send_orphans
from tasks.spool import LINES_BETWEEN_SENDS, Spool


@pytest.mark.parametrize("signal", [KeyboardInterrupt(), TerminationSignal(15)])
def test_an_interrupted_step_is_killed_and_keeps_its_metrics(
    run: tracking.PipelineRun, signal: BaseException
) -> None:
    opened: list[str] = []

    def interrupted() -> None:
        with tracking.step_run(run, "rl", {}) as tracked:
            opened.append(tracked.run_id)
            tracked.log(128, {"objective/kl": 0.5})
            raise signal

    with pytest.raises(type(signal)):
        interrupted()
    found = MlflowClient().get_run(opened[0])
    assert found.info.status == "KILLED"
    assert found.data.metrics == {"objective/kl": 0.5}
    assert found.data.tags["plumbline.error"].startswith(type(signal).__name__)


def failed(run: tracking.PipelineRun, error: Exception) -> tuple[Exception, str]:
    """What comes out of a step in which `error` is raised, and the step's run."""
    opened: list[str] = []
    try:
        with tracking.step_run(run, "rl", {}) as tracked:
            opened.append(tracked.run_id)
            raise error
    except Exception as raised:
        return raised, opened[0]
    raise AssertionError("the step ended well")


def test_a_step_that_fails_says_why_in_a_line(run: tracking.PipelineRun) -> None:
    error = ValueError("bad prompt\nand more of it")
    raised, run_id = failed(run, error)
    assert raised is error
    found = MlflowClient().get_run(run_id)
    assert found.info.status == "FAILED"
    assert found.data.tags["plumbline.error"] == "ValueError: bad prompt"


def test_a_gpu_that_fails_is_no_reason_to_try_again_in_this_process(
    run: tracking.PipelineRun,
) -> None:
    raised, run_id = failed(run, RuntimeError("CUDA error: unspecified launch failure"))
    assert isinstance(raised, TrainingError)
    assert "run again: training resumes at its last checkpoint" in str(raised)
    tags = MlflowClient().get_run(run_id).data.tags
    assert tags["plumbline.error"] == "RuntimeError: CUDA error: unspecified launch failure"


def test_metrics_are_written_in_batches_and_none_is_lost(run: tracking.PipelineRun) -> None:
    with tracking.step_run(run, "rl", {}) as tracked:
        for step in range(2 * LINES_BETWEEN_SENDS + 3):
            tracked.log(step, {"a": step, "b": -step})
    history = MlflowClient().get_metric_history(tracked.run_id, "b")
    assert [(point.step, point.value) for point in history] == [
        (step, -step) for step in range(2 * LINES_BETWEEN_SENDS + 3)
    ]


def test_metrics_are_seen_while_the_step_runs(run: tracking.PipelineRun) -> None:
    with tracking.step_run(run, "rl", {}) as tracked:
        for step in range(LINES_BETWEEN_SENDS):
            tracked.log(step, {"a": step})
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            if len(MlflowClient().get_metric_history(tracked.run_id, "a")) == LINES_BETWEEN_SENDS:
                break
            time.sleep(0.05)
        else:
            pytest.fail("nothing was sent")


def test_what_mlflow_refuses_fails_the_step(run: tracking.PipelineRun) -> None:
    with (
        pytest.raises(MlflowException, match="Invalid"),
        tracking.step_run(run, "rl", {}) as tracked,
    ):
        tracked.log(1, {"a metric, with: odd! signs?": 1.0})
    assert MlflowClient().get_run(tracked.run_id).info.status == "FAILED"


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


def test_runs_say_which_process_works_on_them(run: tracking.PipelineRun) -> None:
    with tracking.step_run(run, "rl", {}) as tracked:
        ids = (run.mlflow_run_id, tracked.run_id)
        names = [MlflowClient().get_run(i).data.tags[tracking.PROCESS_TAG] for i in ids]
    assert [alive(name) for name in names] == [True, True]


def test_a_pipeline_keeps_the_whole_experiment(run: tracking.PipelineRun, tmp_path: Path) -> None:
    model = {"source": "local", "path": "models/a"}
    experiment = Experiment.model_validate({"description": "d", "model": model})
    made = tracking.start_pipeline(
        "p", tmp_path, flatten(experiment), {}, experiment.model_dump(mode="json")
    )
    uri = MlflowClient().get_run(made.mlflow_run_id).info.artifact_uri
    kept = json.loads(tracking.open_uri(f"{uri}/experiment.json").read_bytes())
    assert Experiment.model_validate(kept) == experiment


@pytest.mark.parametrize("method", ["log_batch", "log_dict"])
def test_an_interruption_while_a_run_is_opened_leaves_none_running(
    run: tracking.PipelineRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking.client().at_once, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        tracking.start_pipeline("second", tmp_path, {"seed": 0}, {}, {"seed": 0})
    states = {
        found.info.run_name: found.info.status
        for found in MlflowClient().search_runs([run.experiment_id])
    }
    assert states == {"pipeline": "RUNNING", "second": "KILLED"}


def test_a_stub_says_what_its_step_made(run: tracking.PipelineRun) -> None:
    made = StepResult(digest="abc", uri="file:///none", mlflow_run_id=run.mlflow_run_id)
    stub = tracking.stub_run(run, "sft", "sft-1", made)
    assert tracking.tags_of(stub)["plumbline.digest"] == "abc"


def test_a_spool_that_can_t_be_read_is_dropped_with_a_warning(
    run: tracking.PipelineRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = Spool(tmp_path / "spool" / run.mlflow_run_id)
    spool.claim()
    dead = identity().rsplit("/", 2)[0] + "/999999999/1.00"
    (spool.folder / "owner").write_text(dead)
    spool.records.write_text("no JSON\n")
    send_orphans()
    assert not spool.folder.exists()
    assert f"What run {run.mlflow_run_id} had logged" in capsys.readouterr().err
