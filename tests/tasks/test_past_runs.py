"""Tests of tasks.past_runs on a real SQLite store."""

from collections.abc import Callable
from pathlib import Path

import pytest

from plumbline.process import identity
from tasks import tracking
from tasks.past_runs import last_on_pinned_data, under_way_on_pinned_data

Make = Callable[..., str]


@pytest.fixture
def make(run: tracking.PipelineRun, tmp_path: Path) -> Make:
    def make(name: str, state: str | None = "FINISHED", **changes: str) -> str:
        tags = {"experiment": "tiny", "overrides": "{}", "dirty": "false"} | changes
        made = tracking.start_pipeline(
            name,
            tmp_path,
            {},
            {
                "plumbline.experiment": tags["experiment"],
                "plumbline.overrides": tags["overrides"],
                "data.dirty": tags["dirty"],
            },
        ).mlflow_run_id
        if state:
            tracking.end_run(made, state)  # type: ignore[arg-type]
        return made

    return make


def test_the_last_run_is_a_finished_one_of_the_experiment_as_it_stands(make):
    assert last_on_pinned_data("tiny") is None
    make("first")
    expected = make("second")
    make("failed", "FAILED")
    make("killed", "KILLED")
    make("open", None)
    make("other", experiment="tiny-2")
    make("changed", overrides='{"seed": 1}')
    make("edited", dirty="true")

    found = last_on_pinned_data("tiny")

    assert found is not None
    assert (found.run_id, found.name) == (expected, "second")
    assert last_on_pinned_data("it's") is None


def test_a_run_is_under_way_while_its_process_lives(make):
    make("finished")
    living, dead = make("living", None), make("dead", None)
    make("other", None, experiment="tiny-2")
    host, boot, pid, start = identity().split("/")
    gone = "/".join((host, boot, pid, f"{float(start) - 1000:.2f}"))
    tracking.tag_run(dead, {tracking.PROCESS_TAG: gone})

    assert [run.run_id for run in under_way_on_pinned_data("tiny")] == [living]
