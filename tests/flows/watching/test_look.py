"""Tests of the watch on data: what counts as a change, and what is said of it, without servers."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from flows.watching import look
from flows.watching.found import Found
from flows.watching.look import differences, watch
from flows.watching.report import artifact_key, invalid_page, page, sentence
from plumbline.data.formats import Failure
from plumbline.data.validation import InvalidData
from plumbline.errors import DataError, ParamsError
from plumbline.project import Project
from plumbline.refs import DataVersion
from tasks.data_version import STORE, current_version, read_pin
from tasks.past_runs import PastRun

if TYPE_CHECKING:
    from tests.conftest import SmallProject


def past_run(run_id: str, data: DataVersion) -> PastRun:
    tags = {"data.rev": data.rev, "data.digest": data.digest}
    return PastRun(run_id, f"tiny-{run_id}", "FINISHED", "", tags, {}, {}, {})


class Watched:
    """A project, the runs that MLflow would name, and the events that were told."""

    def __init__(self, project: SmallProject) -> None:
        self.project = project
        self.last: PastRun | None = None
        self.under_way: list[PastRun] = []
        self.told: list[Found] = []

    def look(self, ref: str = "", again: bool = False) -> Found:
        """One look that announces what has changed."""

        def announce(found: Found) -> str:
            self.told.append(found)
            return f"event {len(self.told)}"

        place = Project(self.project.root, self.project.home)
        return watch(place, "tiny", ref, again=again, announce=announce)

    def train(self) -> str:
        """Have a run finish on the data as it is pinned here; returns its id."""
        before = self.last.run_id if self.last else "0"
        self.last = past_run(str(int(before) + 1), self.data())
        return self.last.run_id

    def data(self) -> DataVersion:
        return current_version(self.project.root, "data/sample")

    def add(self, text: str) -> DataVersion:
        """Add a prompt, as a user would."""
        self.project.write_rows("prompts", [*self.project.rows("prompts"), {"prompt": text}])
        self.project.dvc("add", "data")
        return self.data()

    def go_back(self) -> None:
        """Take the data as it was committed."""
        self.project.git("checkout", "--quiet", "data.dvc")
        self.project.dvc("checkout", "--force", "data.dvc")


@pytest.fixture
def watched(project: SmallProject, monkeypatch: pytest.MonkeyPatch) -> Watched:
    made = Watched(project)
    project.home.mkdir()
    monkeypatch.setattr(look, "last_on_pinned_data", lambda experiment: made.last)
    monkeypatch.setattr(look, "under_way_on_pinned_data", lambda experiment: made.under_way)
    return made


def test_data_that_was_trained_on_is_unchanged(watched):
    watched.train()

    found = watched.look()

    assert (found.state, found.files, watched.told) == ("unchanged", [], [])
    assert found.trained is not None
    assert found.trained.rev == found.rev == read_pin(watched.project.root)


def test_an_edit_is_no_change_until_dvc_has_it(watched):
    watched.train()
    watched.project.write_rows("prompts", watched.project.rows("prompts")[:-1])

    assert watched.look().state == "unchanged"


def test_a_change_is_announced_once_with_the_files_that_differ(watched):
    watched.train()
    old = watched.data()
    new = watched.add("What is new here?")

    found = watched.look()

    assert found.state == "announced"
    assert found.event == "event 1"
    assert sentence(found).endswith("in data/sample, 1 file changed. It was announced.")
    assert (found.rev, found.digest) == (new.rev, new.digest)
    (change,) = found.files
    assert change.model_dump() == {
        "path": "prompts.jsonl",
        "change": "changed",
        "old_md5": old.files["prompts.jsonl"],
        "new_md5": new.files["prompts.jsonl"],
        "old_rows": 120,
        "new_rows": 121,
    }
    assert found.steps["prepare_data"].action == "run"
    assert [told.state for told in watched.told] == ["changed"]

    assert watched.look().state == "announced before"
    assert watched.look().event == "event 1"
    assert len(watched.told) == 1
    watched.train()
    assert watched.look().state == "unchanged"


def test_a_run_that_failed_is_started_again_on_demand_alone(watched):
    watched.train()
    watched.add("What is new here?")
    watched.look()
    # Back and forth changes nothing of that.
    watched.project.dvc("push")
    kept = (watched.project.root / "data.dvc").read_bytes()
    watched.go_back()
    assert watched.look().state == "unchanged"
    (watched.project.root / "data.dvc").write_bytes(kept)

    assert watched.look().state == "announced before"
    assert watched.look(again=True).state == "announced"
    assert len(watched.told) == 2


def test_a_version_that_comes_back_after_others_were_trained_is_announced_again(watched):
    watched.train()
    watched.add("What is new here?")
    changed = (watched.project.root / "data.dvc").read_bytes()
    watched.look()
    watched.train()
    watched.go_back()
    assert watched.look().state == "announced"
    watched.train()
    assert watched.look().state == "unchanged"
    (watched.project.root / "data.dvc").write_bytes(changed)

    assert watched.look().state == "announced"


def test_a_first_run_is_a_change_too(watched):
    found = watched.look()

    assert found.state == "announced"
    assert found.trained is None
    assert {change.change for change in found.files} == {"added"}
    assert "data.dvc differs since nothing was trained: in data/sample, 3 files added." in sentence(
        found
    )


def test_a_run_under_way_on_that_data_is_enough(watched):
    watched.train()
    data = watched.add("What is new here?")
    watched.under_way = [past_run("9", data)]

    assert watched.look().state == "under way"
    assert watched.look(again=True).state == "under way"
    assert watched.told == []


def test_another_data_set_of_data_is_no_change(watched):
    watched.train()
    (watched.project.root / "data" / "other").mkdir()
    (watched.project.root / "data" / "other" / "prompts.jsonl").write_text("")
    watched.project.dvc("add", "data")

    found = watched.look()

    assert found.state == "unchanged"
    assert found.trained is not None
    assert found.rev != found.trained.rev


def test_invalid_rows_are_named_and_announced_to_nobody(watched):
    watched.train()
    watched.add("  ")

    for _ in range(2):
        with pytest.raises(InvalidData, match=r"prompts\.jsonl:121 prompt: "):
            watched.look()
    assert watched.told == []


def test_rows_that_the_experiment_sets_aside_are_counted(watched):
    params = watched.project.root / "params" / "tiny.yaml"
    params.write_text(params.read_text().replace("data:\n", "data:\n  on_invalid: quarantine\n"))
    watched.train()
    watched.add("  ")

    found = watched.look()

    assert found.state == "announced"
    assert [(row["file"], row["row"]) for row in found.set_aside] == [("prompts.jsonl", 121)]
    assert "sets 1 row aside" in page(found)


def test_a_commit_of_a_remote_counts_and_the_working_tree_stays(watched, tmp_path):
    watched.train()
    root, other = watched.project.root, tmp_path / "other"
    watched.project.git("clone", "--quiet", "--bare", ".", str(tmp_path / "bare.git"))
    watched.project.git("remote", "add", "origin", str(tmp_path / "bare.git"))
    assert watched.look("origin/main").state == "unchanged"
    # Somebody else changes a row, and pushes the commit with the objects of the store.
    watched.project.git("clone", "--quiet", str(tmp_path / "bare.git"), str(other))
    theirs = type(watched.project)(other, watched.project.home)
    theirs.dvc("pull")
    theirs.write_rows("prompts", [*theirs.rows("prompts"), {"prompt": "From elsewhere?"}])
    theirs.dvc("add", "data")
    theirs.dvc("push")
    theirs.git("add", "data.dvc", STORE)
    theirs.git("commit", "--quiet", "-m", "More data")
    theirs.git("push", "--quiet", "origin", "main")
    # Here, somebody is at work.
    (watched.project.data / "prompts.jsonl").write_text("my work")
    pinned = (root / "data.dvc").read_bytes()

    found = watched.look("origin/main")

    assert found.state == "announced"
    assert (found.source, found.rev) == ("origin/main", read_pin(other))
    assert found.commit == theirs.git("rev-parse", "HEAD").strip()
    assert [(c.path, c.new_rows) for c in found.files] == [("prompts.jsonl", 121)]
    assert watched.look("origin/main").state == "announced before"
    assert (watched.project.data / "prompts.jsonl").read_text() == "my work"
    assert (root / "data.dvc").read_bytes() == pinned
    assert not watched.project.git("status", "--porcelain")


def test_a_version_is_announced_from_one_source_alone(watched):
    watched.train()
    watched.add("What is new here?")
    watched.project.dvc("push")
    watched.project.git("add", "--all")
    watched.project.git("commit", "--quiet", "-m", "More data")

    assert watched.look().state == "announced"
    assert watched.look("main").state == "announced before"
    watched.train()
    assert watched.look("main").state == "unchanged"


def test_only_the_source_that_changed_announces(watched):
    watched.train()
    assert watched.look().state == "unchanged"
    # A branch brings other data, and a run is trained on it; the work tree stays where it is.
    watched.project.git("checkout", "--quiet", "-b", "other")
    watched.add("What is new here?")
    watched.project.dvc("push")
    watched.project.git("add", "--all")
    watched.project.git("commit", "--quiet", "-m", "More data")
    there = watched.data()
    watched.project.git("checkout", "--quiet", "main")
    watched.project.dvc("checkout", "--force", "data.dvc")
    assert watched.look("other").state == "announced"
    watched.last = past_run("2", there)

    found = watched.look()

    assert found.state == "superseded"
    assert "last trained on; the run tiny-2 was trained on other data." in sentence(found)
    assert watched.look("other").state == "unchanged"
    assert watched.look().state == "superseded"
    assert len(watched.told) == 1
    # What changes here is announced, and so is what comes back afterwards.
    before = (watched.project.root / "data.dvc").read_bytes()
    watched.add("And what is new here?")
    assert watched.look().state == "announced"
    (watched.project.root / "data.dvc").write_bytes(before)
    assert watched.look().state == "announced"


def test_a_ref_without_data_is_an_error(watched):
    watched.project.git("checkout", "--quiet", "--orphan", "empty")
    watched.project.git("rm", "--quiet", "--cached", "data.dvc")
    watched.project.git("commit", "--quiet", "-m", "No data")

    with pytest.raises(DataError, match=r"empty \([0-9a-f]{12}\) has no data\.dvc"):
        watched.look("empty")
    with pytest.raises(ParamsError, match="ref: expected a branch"):
        watched.look("nowhere")


def test_what_the_data_was_may_be_forgotten(watched):
    watched.train()
    watched.add("What is new here?")
    assert watched.last is not None
    watched.last.tags["data.rev"] = "0" * 32 + ".dir"

    changes = watched.look().files

    assert {change.path for change in changes} == set(watched.data().files)
    assert all((c.change, c.old_md5, c.old_rows) == ("changed", None, None) for c in changes)


def test_files_are_added_changed_or_removed(tmp_path):
    changes = differences(tmp_path, {"a": "1", "b": "1", "c": "1"}, {"b": "1", "c": "2", "d": "2"})

    assert [(c.path, c.change) for c in changes] == [
        ("a", "removed"),
        ("c", "changed"),
        ("d", "added"),
    ]


# Words and pages.


def test_a_page_shows_rows_as_they_are():
    text = "| a `b` <script>alert(1)</script>\n# c"
    failures = [Failure("prompts.jsonl", 3, "prompt", "blank", text)]

    shown = invalid_page("tiny", "origin/main", failures)

    (row,) = [line for line in shown.splitlines() if line.startswith("| prompts")]
    assert row.startswith("| prompts.jsonl | 3 | prompt | blank | ")
    assert row.count("|") == 6
    assert "<" not in row
    assert "`" not in row
    assert "#c" not in row
    assert "1 fault in the data of data.dvc of origin/main; nothing was started." in shown


def test_a_page_of_many_faults_counts_the_rest():
    failures = [Failure("prompts.jsonl", row, "prompt", "blank") for row in range(1, 302)]

    shown = invalid_page("tiny", "", failures)

    assert shown.count("| prompts.jsonl |") == 200
    assert "… and 101 faults more." in shown


@pytest.mark.parametrize(
    ("experiment", "key"),
    [("quickstart", "data-quickstart"), ("My_Run.v2", "data-my-run-v2"), ("__", "data-watch")],
)
def test_prefect_takes_the_key_of_a_page(experiment, key):
    assert artifact_key(experiment) == key


# The command line.


def watch_by_hand(project: SmallProject, *arguments: str) -> subprocess.CompletedProcess[str]:
    return project.cli("data", "watch", "--experiment", "tiny", *arguments)


def test_one_look_by_hand_needs_no_server(project, tmp_path):
    file = tmp_path / "found.json"
    done = watch_by_hand(project, "--json", str(file))

    assert done.returncode == 0, done.stderr
    assert (
        "data.dvc differs since nothing was trained: in data/sample, 3 files added." in done.stdout
    )
    assert "Nothing was started. No Prefect server is up." in done.stdout
    assert "`plumbline run tiny`" in done.stdout
    found = json.loads(file.read_bytes())
    assert (found["state"], found["event"]) == ("changed", None)
    assert [change["path"] for change in found["files"]][-1] == "prompts.jsonl"
    assert found["steps"]["prepare_data"]["action"] == "run"

    project.write_rows("prompts", [*project.rows("prompts"), {"prompt": ""}])
    project.dvc("add", "data")
    done = watch_by_hand(project)

    assert done.returncode == 2
    assert "prompts.jsonl:121 prompt" in done.stderr
    assert not (project.home / "watch").exists()
