"""Tests of tasks.experiments: whose runs are found where, on own stores and shared ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from plumbline.errors import MachineError, ParamsError
from tasks import inventory, past_runs, registry, tracking
from tasks.experiments import experiment_name, view_tag

Enter = Callable[[str], Path]


def forget() -> None:
    """As a new process knows nothing of the store."""
    for function in vars(tracking).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.fixture
def enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Enter:
    """Makes a project's folder, if it is not there, and works in it; returns its home."""

    def change(name: str) -> Path:
        root = tmp_path / name
        (root / "params").mkdir(parents=True, exist_ok=True)
        (root / "data.dvc").touch()
        home = root / ".plumbline"
        home.mkdir(exist_ok=True)
        monkeypatch.chdir(root)
        monkeypatch.setenv("PLUMBLINE_HOME", str(home))
        forget()
        return home

    return change


@pytest.fixture
def shared(tmp_path: Path, empty_store: Path, open_store: Callable[[str], None]) -> None:
    """A store that lies in no project."""
    shutil.copyfile(empty_store, tmp_path / "shared.db")
    open_store(f"sqlite:///{tmp_path / 'shared.db'}")


def finished(name: str, home: Path) -> str:
    run = tracking.start_pipeline(name, home, {}, {})
    tracking.end_run(run.mlflow_run_id, "FINISHED")
    return run.mlflow_run_id


def test_an_experiment_is_named_by_the_folder_unless_it_is_named(
    enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("one")
    assert experiment_name() == "one"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "a team's")
    assert experiment_name() == "a team's"


def test_projects_on_one_server_find_their_own_runs_alone(enter: Enter, shared: None) -> None:
    first = finished("of-one", enter("one"))
    second = finished("of-two", enter("two"))
    assert [run.run_id for run in past_runs.last_pipelines(9)] == [second]
    assert past_runs.find_run(first) is None
    assert tracking.running(enter("three")) == []
    assert past_runs.last_pipelines(9) == []
    enter("one")
    assert [run.run_id for run in past_runs.last_pipelines(9)] == [first]


def test_a_project_whose_folder_was_renamed_still_has_its_runs(
    enter: Enter, empty_store: Path, open_store: Callable[[str], None]
) -> None:
    home = enter("before")
    shutil.copyfile(empty_store, home / "mlflow.db")
    open_store(f"sqlite:///{home / 'mlflow.db'}")
    enter("before")
    first = finished("a", home)
    moved = home.parent.rename(home.parent.with_name("after")) / ".plumbline"
    mlflow.set_tracking_uri(f"sqlite:///{moved / 'mlflow.db'}")
    assert enter("after") == moved
    second = finished("b", moved)

    names = {found.name for found in MlflowClient().search_experiments()}
    assert {"before", "after"} <= names
    assert {run.run_id for run in past_runs.last_pipelines(9)} == {first, second}
    assert {run.run_id for run in inventory.take_inventory(moved).runs} == {first, second}


def test_another_project_s_registered_model_is_refused(
    enter: Enter, shared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("one")
    registry.check_owner("policy")
    MlflowClient().create_registered_model("policy", {registry.PROJECT_TAG: "one"})
    registry.check_owner("policy")

    enter("two")
    with pytest.raises(ParamsError, match=r"registry\.name: .* this project \(two\), got policy"):
        registry.check_owner("policy")
    registry.check_owner("another")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "one")
    registry.check_owner("policy")


def test_an_experiment_has_the_view_that_pages_link_to(enter: Enter, shared: None) -> None:
    client = MlflowClient()
    made = client.get_experiment(client.create_experiment("one"))
    run = tracking.start_pipeline("a", enter("one"), {}, {})
    (tag,) = view_tag()
    assert run.experiment_id == made.experiment_id
    columns = json.loads(client.get_experiment(run.experiment_id).tags[tag])["selectedColumns"]
    assert "metrics.`eval/win_rate`" in columns


def test_an_experiment_that_was_deleted_is_named(enter: Enter, shared: None) -> None:
    run = tracking.start_pipeline("a", enter("one"), {}, {})
    MlflowClient().delete_experiment(run.experiment_id)
    forget()
    with pytest.raises(MachineError, match=f"one was deleted.*--experiment-id {run.experiment_id}"):
        tracking.start_pipeline("b", enter("one"), {}, {})
