"""Faults injected one by one into a project that has run, through the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from prefect.results import ResultRecord, ResultRecordMetadata
from prefect.serializers import PickleSerializer

from tasks.records import local_path, read_result

if TYPE_CHECKING:
    from tests.conftest import SmallProject, Trained


class Copy(NamedTuple):
    """A project of its own with all that the trained one has made."""

    project: SmallProject
    first: dict[str, Any]

    def record(self, step: str) -> Path:
        return self.project.home / "results" / self.first["steps"][step]["key"]

    def result(self, step: str) -> Any:
        found = read_result(self.record(step).parent, step, self.record(step).name)
        assert found is not None
        return found

    def weights(self, step: str) -> Path:
        folder = local_path(self.result(step).uri)
        assert folder is not None
        return folder / "model" / "model.safetensors"

    def run(self) -> tuple[dict[str, Any], str]:
        """What `run --json` writes, and what it says on the way."""
        file = self.project.root / "run.json"
        done = self.project.cli("run", "tiny", "--json", str(file))
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(file.read_bytes()), done.stderr


@pytest.fixture(scope="module")
def copy(trained: Trained) -> Copy:
    """Each test damages one thing, and the run in it makes the thing again."""
    return Copy(*trained)


def ran(result: dict[str, Any]) -> set[str]:
    return {name for name, step in result["steps"].items() if step["status"] == "ran"}


def digests(result: dict[str, Any]) -> dict[str, str]:
    return {name: step["digest"] for name, step in result["steps"].items()}


def test_a_copy_is_whole_and_needs_nothing(copy):
    done = copy.project.cli("verify")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 results" in done.stdout
    assert "all as it was made" in done.stdout
    plan = copy.project.result("plan")["steps"]
    assert {step["action"] for step in plan.values()} == {"cached"}


def cut(path: Path) -> None:
    os.truncate(path, 100)


def flip(path: Path) -> None:
    """One bit, and the times set back: as if the disk had done it."""
    state, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "is gone: expected a file, got none"),
        (cut, "was cut short: expected"),
        (flip, "does not match its digest: expected sha256"),
    ],
    ids=["deleted", "truncated", "one bit flipped"],
)
def test_a_damaged_model_is_named_and_made_again(
    copy: Copy, damage: Callable[[Path], Any], said: str
) -> None:
    path = copy.weights("sft")
    damage(path)

    plan = copy.project.result("plan")["steps"]
    result, stderr = copy.run()

    assert plan["sft"]["action"] == "run"
    assert plan["sft"]["because"].startswith(f"{path} {said}")
    assert f"sft: {path} {said}" in stderr
    assert "; the step runs again" in stderr
    # The same bytes came out, so what was made of them still holds.
    assert ran(result) == {"sft"}
    assert digests(result) == digests(copy.first)
    assert copy.weights("sft").exists()


def test_verify_names_the_damage_and_all_that_need_it(copy):
    path = copy.weights("rl")
    content = path.read_bytes()
    flip(path)

    done = copy.project.cli("verify")
    path.write_bytes(content)

    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{path} does not match its digest: expected sha256" in done.stdout
    keys = [copy.first["steps"][step]["key"] for step in ("register", "rl")]
    assert f"needed by {', '.join(keys)}, plumbline-policy/1 @challenger" in done.stdout


def test_a_damaged_figure_is_named_and_made_again(copy):
    path = local_path(copy.result("reward_model").figures["reward_model_scores.png"])
    flip(path)

    result, stderr = copy.run()

    assert f"reward_model: {path} does not match its digest" in stderr
    assert ran(result) == {"reward_model"}
    assert digests(result) == digests(copy.first)


def test_a_garbled_record_is_a_miss(copy):
    record = copy.record("evaluate")
    record.write_text(record.read_text()[:200])

    result, _ = copy.run()

    assert ran(result) == {"evaluate"}
    assert digests(result) == digests(copy.first)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def planted(folder: Path) -> bytes:
    """A record of Prefect's that, if Prefect loads it, makes a folder."""
    metadata = ResultRecordMetadata(serializer=PickleSerializer(), storage_key="k")
    return ResultRecord(result=Bomb(folder), metadata=metadata).serialize()


def test_a_record_that_is_a_pickle_is_refused_and_not_loaded(copy, tmp_path):
    live, bomb = tmp_path / "live", tmp_path / "bomb"
    ResultRecord.deserialize(planted(live))
    assert live.exists(), "the bomb is a dud: this test would prove nothing"
    copy.record("evaluate").write_bytes(planted(bomb))

    plan = copy.project.result("plan")["steps"]
    result, _ = copy.run()

    assert plan["evaluate"]["action"] == "run"
    assert ran(result) == {"evaluate"}
    assert digests(result) == digests(copy.first)
    assert not bomb.exists()
    assert copy.result("evaluate").digest == copy.first["steps"]["evaluate"]["digest"]


def own_files(project: SmallProject) -> dict[str, bytes]:
    """What the user has made, which no gc may touch."""
    folders = (project.root / name for name in ("data", "params", ".dvc-store"))
    paths = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in paths}


def test_gc_lists_what_it_would_remove_and_removes_it_when_told(copy):
    before = own_files(copy.project)
    replaced = copy.result("base_model")
    result = copy.project.result("run", "--refresh", "base_model")
    assert ran(result) == {"base_model"}

    listing = copy.project.cli("gc", "--keep-last", "1")
    removing = copy.project.cli("gc", "--keep-last", "1", "--delete")

    for done in (listing, removing):
        assert done.returncode == 0, done.stderr
        assert f"model {replaced.mlflow_model_id}" in done.stdout
    assert listing.stdout.endswith("Nothing was removed; --delete removes what is listed.\n")
    assert listing.stdout.startswith(removing.stdout)
    verified = copy.project.cli("verify")
    assert verified.returncode == 0, verified.stdout
    assert "7 results, 0 other models, 1 registered versions" in verified.stdout
    plan = copy.project.result("plan")["steps"]
    assert {step["action"] for step in plan.values()} == {"cached"}
    assert own_files(copy.project) == before != {}


def test_gc_says_that_a_server_s_store_is_not_its_own(copy):
    done = copy.project.cli("gc", MLFLOW_TRACKING_URI="http://127.0.0.1:9")

    assert done.returncode == 2
    assert "expected MLFLOW_TRACKING_URI unset" in done.stderr
    assert "Traceback" not in done.stderr
