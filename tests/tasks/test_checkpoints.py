"""Where a step's checkpoints are, and what is said of them."""

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from plumbline.params.schema import CheckpointParams
from plumbline.training.checkpoint import Keeper, Place
from tasks import tracking
from tasks.checkpoints import checkpoint_folder, discard_checkpoints, step_checkpoints

PLACE = Place(3, 96, "episode 96 of 128")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLUMBLINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def keyed(run: tracking.PipelineRun) -> tracking.PipelineRun:
    return run.model_copy(update={"key": "rl-123", "checkpoints": CheckpointParams(keep=5)})


def test_they_are_in_a_folder_named_by_the_key(keyed: tracking.PipelineRun, home: Path) -> None:
    with tracking.step_run(keyed, "rl", {}) as tracked:
        found = step_checkpoints(keyed, tracked)
    assert found is not None
    assert found.folder == home / "checkpoints" / "rl-123"
    assert found.params.keep == 5
    assert not found.folder.exists()


def test_a_step_without_a_key_has_none(run: tracking.PipelineRun) -> None:
    with tracking.step_run(run, "rl", {}) as tracked:
        assert step_checkpoints(run, tracked) is None


def test_a_resumed_step_says_so_on_the_terminal_and_on_its_run(
    keyed: tracking.PipelineRun, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracking.step_run(keyed, "rl", {}) as tracked:
        found = step_checkpoints(keyed, tracked)
        assert found is not None
        found.save(PLACE, {"weights": {"w": torch.ones(3)}})
        assert Keeper(found, dict).resume() is not None
    said = "rl: goes on from episode 96 of 128, where an earlier run left a checkpoint"
    assert said in capsys.readouterr().err
    assert MlflowClient().get_run(tracked.run_id).data.tags["resumed_from_step"] == "96"


def test_a_damaged_one_is_a_warning_and_no_warning_of_the_training(
    keyed: tracking.PipelineRun, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracking.step_run(keyed, "rl", {}) as tracked:
        found = step_checkpoints(keyed, tracked)
        assert found is not None
        found.save(PLACE, {})
        (found.folder / "0000000003" / "values.json").write_text("[]")
        assert found.latest() is None
    assert "values.json does not match its sha256" in capsys.readouterr().err
    # It is a metric of the step, which must not depend on how often the step was started.
    assert tracked.warnings == 0


def test_discarding_removes_those_of_one_step_alone(
    keyed: tracking.PipelineRun, home: Path
) -> None:
    for key in ("rl-123", "rl-456"):
        with tracking.step_run(keyed, "rl", {}) as tracked:
            found = step_checkpoints(keyed.model_copy(update={"key": key}), tracked)
        assert found is not None
        found.save(PLACE, {})
    discard_checkpoints(home, "rl-123")
    discard_checkpoints(home, "rl-123")
    assert [path.name for path in (home / "checkpoints").iterdir()] == ["rl-456"]


def test_no_key_never_means_all_of_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cache key"):
        discard_checkpoints(tmp_path, "")
    with pytest.raises(ValueError, match="cache key"):
        checkpoint_folder(tmp_path, "")
