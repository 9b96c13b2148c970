"""The store of checkpoints: what is whole comes back, what is damaged or half-written does not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from plumbline import artifacts
from plumbline.errors import TrainingError
from plumbline.params.schema import CheckpointParams
from plumbline.training import checkpoint
from plumbline.training.checkpoint import Checkpoints, Keeper, Place, State

FILES = ["manifest.json", "tensors.safetensors", "values.json"]


def place(number: int) -> Place:
    return Place(number, 10 * number, f"step {10 * number} of 100")


def state(number: int) -> State:
    generator = torch.Generator().manual_seed(number)
    return {
        "weights": {"a.b": torch.randn(3, 4, generator=generator), "none": None},
        "random": generator.get_state(),
        "history": [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": float("inf")}],
        "nested": [[torch.tensor(number), 1, "text"], True],
    }


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, warnings: list[str]) -> Checkpoints:
    return Checkpoints(tmp_path / "key", CheckpointParams(keep=2), warn=warnings.append)


def folders(checkpoints: Checkpoints) -> list[str]:
    return sorted(os.listdir(checkpoints.folder))


def number_of(checkpoints: Checkpoints) -> int | None:
    found = checkpoints.latest()
    return found.place.number if found else None


def same(one: Any, other: Any) -> bool:
    match one:
        case torch.Tensor():
            return one.dtype == other.dtype and torch.equal(one, other)
        case dict():
            return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
        case list():
            return len(one) == len(other) and all(map(same, one, other))
    return one == other and type(one) is type(other)


def test_what_was_saved_comes_back(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() is None
    assert checkpoints.save(place(3), state(3))
    found = checkpoints.latest()
    assert found is not None
    assert found.place == place(3)
    assert same(found.state, state(3))


def test_views_and_tensors_of_any_layout_are_saved(checkpoints: Checkpoints) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    views = {"row": whole[1], "column": whole[:, 1], "turned": whole.T, "empty": whole[:0]}
    checkpoints.save(place(1), views)
    found = checkpoints.latest()
    assert found is not None
    assert all(torch.equal(found.state[name], view) for name, view in views.items())


def test_the_files_are_safetensors_and_json(checkpoints: Checkpoints) -> None:
    checkpoints.save(place(1), state(1))
    assert folders(checkpoints) == ["0000000001"]
    assert sorted(os.listdir(checkpoints.folder / "0000000001")) == FILES
    json.loads((checkpoints.folder / "0000000001" / "values.json").read_text())


def test_the_newest_are_kept(checkpoints: Checkpoints) -> None:
    for number in (1, 9, 10, 11):
        checkpoints.save(place(number), state(number))
    assert folders(checkpoints) == ["0000000010", "0000000011"]
    assert number_of(checkpoints) == 11


def test_clearing_removes_all(checkpoints: Checkpoints) -> None:
    checkpoints.clear()
    checkpoints.save(place(1), state(1))
    checkpoints.clear()
    assert not checkpoints.folder.exists()
    assert checkpoints.latest() is None


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["gone", "truncated", "one bit", "empty"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(
    checkpoints: Checkpoints, warnings: list[str], file: str, damage: str
) -> None:
    for number in (1, 2):
        checkpoints.save(place(number), state(number))
    path = checkpoints.folder / "0000000002" / file
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        kept = {"truncated": content[:-1], "one bit": content, "empty": b""}
        path.write_bytes(kept[damage])
    found = checkpoints.latest()
    assert found is not None
    # One bit of the manifest may be in a part that says nothing about the files.
    if found.place.number == 2:
        assert (file, damage) == ("manifest.json", "one bit")
        return
    assert same(found.state, state(1))
    (warning,) = warnings
    assert "0000000002" in warning
    assert file in warning or file == "manifest.json"
    assert folders(checkpoints) == ["0000000001"]


def test_with_every_one_damaged_there_is_none(
    checkpoints: Checkpoints, warnings: list[str]
) -> None:
    for number in (1, 2):
        checkpoints.save(place(number), state(number))
        (checkpoints.folder / f"{number:010d}" / "values.json").unlink()
    assert checkpoints.latest() is None
    assert len(warnings) == 2


def test_a_half_written_one_is_not_seen_and_goes_away(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(place(1), state(1))
    # As a killed process leaves it.
    left = checkpoints.folder / ".0000000002.999"
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"half")
    assert number_of(checkpoints) == 1
    checkpoints.save(place(3), state(3))
    assert folders(checkpoints) == ["0000000001", "0000000003"]


@pytest.mark.parametrize("file", [0, 1, 2])
def test_an_interruption_while_it_is_written_leaves_nothing_half(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, file: int
) -> None:
    checkpoints.save(place(1), state(1))
    synced: list[Path] = []

    def interrupted(path: Path) -> None:
        synced.append(path)
        if len(synced) > file:
            raise KeyboardInterrupt

    for module in (artifacts, checkpoint):
        monkeypatch.setattr(module, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(place(2), state(2))
    assert folders(checkpoints) == ["0000000001"]


def test_saving_the_same_place_again_replaces_it(checkpoints: Checkpoints) -> None:
    checkpoints.save(place(1), state(5))
    checkpoints.save(place(1), state(1))
    found = checkpoints.latest()
    assert found is not None
    assert same(found.state, state(1))


FULL = """
import resource, sys
from pathlib import Path
import torch
from plumbline.params.schema import CheckpointParams
from plumbline.training.checkpoint import Checkpoints, Place

checkpoints = Checkpoints(Path(sys.argv[1]), CheckpointParams(), warn=print)
assert checkpoints.save(Place(1, 1, "step 1 of 9"), {"weights": torch.zeros(10)})
# No file may grow further: the disk is as good as full.
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
assert not checkpoints.save(Place(2, 2, "step 2 of 9"), {"weights": torch.zeros(100_000)})
assert checkpoints.newest().number == 1
assert checkpoints.save(Place(3, 3, "step 3 of 9"), {"weights": torch.ones(10)})
print("went on")
"""


def test_a_full_disk_costs_one_checkpoint_and_not_the_training(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "key")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no checkpoint could be written at step 2 of 9" in done.stdout
    assert "File too large" in done.stdout
    assert "the one at step 1 of 9 stays" in done.stdout
    assert "went on" in done.stdout
    assert sorted(os.listdir(tmp_path / "key")) == ["0000000001", "0000000003"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_no_reason_to_stop(tmp_path: Path) -> None:
    warned: list[str] = []
    tmp_path.chmod(0o500)
    checkpoints = Checkpoints(tmp_path / "key", CheckpointParams(), warn=warned.append)
    assert not checkpoints.save(place(1), state(1))
    assert "Permission denied" in warned[0]


# When


def test_they_are_due_after_so_many_commit_points(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointParams(every_steps=3))
    due = []
    for number in range(7):
        due.append(checkpoints.due())
        if due[-1]:
            checkpoints.save(place(number), state(number))
    assert due == [False, False, True, False, False, True, False]


def test_they_are_due_after_so_much_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    checkpoints = Checkpoints(tmp_path, CheckpointParams(every_minutes=0.5))
    assert not checkpoints.due()
    now[0] += 29
    assert not checkpoints.due()
    now[0] += 2
    assert checkpoints.due()
    checkpoints.save(place(1), state(1))
    assert not checkpoints.due()


# The keeper


def keep(checkpoints: Checkpoints, numbers: list[int], weights: State) -> Keeper:
    keeper = Keeper(checkpoints, lambda: weights)
    for number in numbers:
        keeper.commit(place(number), lambda number=number: {"number": number})  # type: ignore[misc]
    return keeper


def test_the_last_commit_point_is_saved_at_the_end(checkpoints: Checkpoints) -> None:
    keeper = keep(checkpoints, [1, 2], {"w": torch.ones(2)})
    assert checkpoints.latest() is None
    with keeper.watching():
        pass
    found = checkpoints.latest()
    assert found is not None
    assert found.state["number"] == 2
    assert torch.equal(found.state["weights"]["w"], torch.ones(2))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_the_last_commit_point_is_saved_on_an_interruption(
    checkpoints: Checkpoints, error: type[BaseException]
) -> None:
    keeper = keep(checkpoints, [1, 2], {})
    with pytest.raises(error), keeper.watching():
        raise error
    assert number_of(checkpoints) == 2


def test_a_second_interruption_does_not_spoil_the_first(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = keep(checkpoints, [1], {})
    synced: list[Path] = []

    def impatient(path: Path) -> None:
        synced.append(path)
        signal.raise_signal(signal.SIGINT)

    for module in (artifacts, checkpoint):
        monkeypatch.setattr(module, "sync", impatient)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), keeper.watching():
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(synced) == 5
    assert number_of(checkpoints) == 1


@pytest.mark.parametrize("error", [TrainingError("the loss is nan"), ValueError("bad value")])
def test_an_error_leaves_the_last_good_one(checkpoints: Checkpoints, error: Exception) -> None:
    checkpoints.save(place(1), state(1))
    keeper = keep(checkpoints, [2], {})
    with pytest.raises(type(error)) as caught, keeper.watching():
        raise error
    assert number_of(checkpoints) == 1
    said = "The checkpoint at step 10 of 100 is kept" in str(caught.value)
    assert said == isinstance(error, TrainingError)


def test_weights_that_are_not_finite_are_not_saved(
    checkpoints: Checkpoints, warnings: list[str]
) -> None:
    checkpoints.save(place(1), state(1))
    keeper = keep(checkpoints, [2], {"w": [torch.tensor([1.0, float("nan")])]})
    with pytest.raises(KeyboardInterrupt), keeper.watching():
        raise KeyboardInterrupt
    assert number_of(checkpoints) == 1
    assert "not finite" in warnings[0]


def test_without_checkpoints_nothing_is_asked_for() -> None:
    keeper = Keeper(None, lambda: pytest.fail("nobody needs the weights"))
    assert keeper.resume() is None
    keeper.commit(place(1), lambda: pytest.fail("nobody needs the state"))
    with pytest.raises(KeyboardInterrupt), keeper.watching():
        raise KeyboardInterrupt


def test_where_a_training_goes_on_is_said(tmp_path: Path) -> None:
    places: list[Place] = []
    checkpoints = Checkpoints(tmp_path / "key", CheckpointParams(), resumed=places.append)
    assert Keeper(checkpoints, dict).resume() is None
    assert places == []
    checkpoints.save(place(4), state(4))
    assert Keeper(checkpoints, dict).resume() is not None
    assert places == [place(4)]
