"""Tests of tasks.data_version, against DVC itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from plumbline.errors import DataError
from tasks.data_version import (
    current_version,
    dir_hash,
    file_hashes,
    git_state,
    pinned_hashes,
    pull_missing,
    read_pin,
    snapshot,
    status,
)

if TYPE_CHECKING:
    from tests.conftest import SmallProject

EMPTY_MD5 = "d41d8cd98f00b204e9800998ecf8427e"


def objects(project: SmallProject, store: str) -> list[Path]:
    """The files of DVC's cache or remote, without the list that names them."""
    folder = project.root / store / "files" / "md5"
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".dir"]


def forget(project: SmallProject) -> None:
    """Make the project as a fresh clone is: without data and without a cache."""
    shutil.rmtree(project.root / "data")
    shutil.rmtree(project.root / ".dvc" / "cache")


def test_the_hash_of_files_is_their_md5(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "empty").write_bytes(b"")

    assert file_hashes(tmp_path) == {"a/empty": EMPTY_MD5}


def test_the_hash_of_a_folder_is_dvcs_own(project):
    for name in ("z.csv", "sample/Ä b.jsonl", "sample-2/a", "sample/nested/deep/x"):
        path = project.root / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    project.dvc("add", "data")

    pin = yaml.safe_load((project.root / "data.dvc").read_text())["outs"][0]["md5"]

    assert pin.endswith(".dir")
    assert dir_hash(file_hashes(project.root / "data")) == pin == read_pin(project.root)


def test_the_list_of_a_pin_is_dvcs_own(project):
    expected = file_hashes(project.root / "data")
    pin = read_pin(project.root)

    assert pinned_hashes(project.root, pin) == expected
    shutil.rmtree(project.root / ".dvc" / "cache")
    assert pinned_hashes(project.root, pin) == expected
    shutil.rmtree(project.root / ".dvc-store")
    assert pinned_hashes(project.root, pin) is None


def test_a_version_is_its_files_and_its_pin(project):
    version = current_version(project.root, "data/sample")

    assert set(version.files) == {"demonstrations.jsonl", "preferences.jsonl", "prompts.jsonl"}
    assert version.rev == read_pin(project.root)
    assert version.digest == dir_hash(version.files)
    assert not version.dirty


def test_a_data_set_does_not_see_its_neighbours(project):
    before = current_version(project.root, "data/sample")
    (project.root / "data" / "sample-2").mkdir()
    (project.root / "data" / "sample-2" / "prompts.jsonl").write_text("")
    project.dvc("add", "data")

    after = current_version(project.root, "data/sample")

    assert after.digest == before.digest
    assert after.files == before.files
    assert after.rev != before.rev


def test_an_edit_is_an_error_that_says_what_to_do(project):
    (project.data / "prompts.jsonl").write_text("")
    (project.data / "notes.txt").write_text("")
    (project.data / "demonstrations.jsonl").unlink()

    with pytest.raises(DataError) as error:
        current_version(project.root, "data/sample")

    message = str(error.value)
    assert "changed: data/sample/prompts.jsonl" in message
    assert "new: data/sample/notes.txt" in message
    assert "missing: data/sample/demonstrations.jsonl" in message
    assert "dvc add data" in message
    assert "--allow-dirty" in message


def test_an_edit_that_is_allowed_is_noted(project):
    (project.data / "prompts.jsonl").write_text("")

    version = current_version(project.root, "data/sample", allow_dirty=True)

    assert version.dirty
    assert version.rev == read_pin(project.root)
    assert version.files["prompts.jsonl"] == EMPTY_MD5


def test_allowing_an_edit_does_not_make_one(project):
    assert not current_version(project.root, "data/sample", allow_dirty=True).dirty


def test_a_process_verifies_a_pinned_version_once(project):
    before = current_version(project.root, "data/sample")
    (project.data / "prompts.jsonl").write_text("edited while a run goes on")

    assert current_version(project.root, "data/sample") == before
    assert current_version(project.root, "data/sample", allow_dirty=True) == before
    project.dvc("add", "data")
    after = current_version(project.root, "data/sample")
    assert after.rev == read_pin(project.root) != before.rev
    assert after.files["prompts.jsonl"] != before.files["prompts.jsonl"]


# Private copies.


def test_a_snapshot_is_the_version_and_nothing_else(project, tmp_path):
    version = current_version(project.root, "data/sample")
    (project.data / "new.jsonl").write_text("not of that version")

    copy = snapshot(project.root, version, tmp_path)

    assert copy == tmp_path / "data" / "sample"
    assert file_hashes(copy) == version.files


def test_files_in_folders_are_copied_too(project, tmp_path):
    (project.data / "more").mkdir()
    (project.data / "more" / "ä b.jsonl").write_text("x")
    project.dvc("add", "data")
    version = current_version(project.root, "data/sample")

    assert file_hashes(snapshot(project.root, version, tmp_path)) == version.files


@pytest.mark.parametrize("lost", ["", ".dvc/cache", ".dvc-store"])
@pytest.mark.parametrize("edit", ["edited", "emptied", "removed", "a folder"])
def test_a_file_that_was_edited_meanwhile_comes_from_dvc(project, tmp_path, edit, lost):
    version = current_version(project.root, "data/sample")
    path = project.data / "prompts.jsonl"
    path.unlink()
    if edit == "a folder":
        path.mkdir()
    elif edit != "removed":
        path.write_text("" if edit == "emptied" else "my work")
    if lost:
        shutil.rmtree(project.root / lost)

    assert file_hashes(snapshot(project.root, version, tmp_path)) == version.files
    assert path.is_dir() == (edit == "a folder")
    assert edit != "edited" or path.read_text() == "my work"


def test_a_damaged_cache_is_not_taken(project, tmp_path):
    version = current_version(project.root, "data/sample")
    (project.data / "prompts.jsonl").write_text("my work")
    for path in objects(project, ".dvc/cache"):
        path.chmod(0o644)
        path.write_bytes(b"other bytes")

    assert file_hashes(snapshot(project.root, version, tmp_path)) == version.files


def test_without_the_bytes_a_snapshot_is_an_error_that_names_the_file(project, tmp_path):
    version = current_version(project.root, "data/sample")
    (project.data / "prompts.jsonl").write_text("my work")
    shutil.rmtree(project.root / ".dvc" / "cache")
    shutil.rmtree(project.root / ".dvc-store")

    with pytest.raises(DataError, match=r"data/sample/prompts\.jsonl was edited while the run"):
        snapshot(project.root, version, tmp_path)


def test_a_dirty_version_that_is_edited_again_is_an_error(project, tmp_path):
    (project.data / "prompts.jsonl").write_text("my work")
    version = current_version(project.root, "data/sample", allow_dirty=True)
    assert file_hashes(snapshot(project.root, version, tmp_path / "1")) == version.files
    (project.data / "prompts.jsonl").write_text("more work")

    with pytest.raises(DataError, match="Run again, on the data as it is now"):
        snapshot(project.root, version, tmp_path / "2")


@pytest.mark.parametrize(
    "path", ["/etc", "data/../params", "params", "../data/sample", "", "data"], ids=repr
)
def test_a_data_set_outside_data_is_refused(project, path):
    with pytest.raises(DataError, match=r"data\.path"):
        current_version(project.root, path)


def test_a_data_set_that_is_not_there_names_those_that_are(project):
    with pytest.raises(DataError, match=r"no data set at data/smaple; data/ holds sample"):
        current_version(project.root, "data/smaple")


@pytest.mark.parametrize(
    "content",
    [None, "", "outs: []", "outs: 3", "{", "outs:\n- path: data"],
    ids=["missing", "empty", "no outs", "number", "broken", "no md5"],
)
def test_a_pin_that_dvc_did_not_write_is_an_error(project, content):
    path = project.root / "data.dvc"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)

    with pytest.raises(DataError, match=r"git checkout data\.dvc"):
        read_pin(project.root)


def test_missing_data_is_pulled(project):
    expected = file_hashes(project.root / "data")
    forget(project)

    assert pull_missing(project.root)
    assert file_hashes(project.root / "data") == expected
    assert not current_version(project.root, "data/sample").dirty


def test_data_is_pulled_from_wherever_the_command_is_called(project, monkeypatch):
    monkeypatch.chdir(project.root / "params")
    forget(project)

    assert pull_missing(project.root)
    assert not current_version(project.root, "data/sample").dirty


def test_one_missing_file_is_pulled_from_the_cache(project):
    (project.data / "prompts.jsonl").unlink()

    assert pull_missing(project.root)
    assert not current_version(project.root, "data/sample").dirty


def test_data_that_is_there_is_not_pulled(project):
    shutil.rmtree(project.root / ".dvc-store")

    assert not pull_missing(project.root)


def test_a_pull_never_discards_an_edit(project):
    (project.data / "prompts.jsonl").write_text("my work")
    (project.data / "demonstrations.jsonl").unlink()

    with pytest.raises(DataError, match=r"changed: data/sample/prompts\.jsonl"):
        pull_missing(project.root)

    assert (project.data / "prompts.jsonl").read_text() == "my work"


def test_an_edit_alone_is_left_for_the_check(project):
    (project.data / "prompts.jsonl").write_text("my work")

    assert not pull_missing(project.root)
    assert (project.data / "prompts.jsonl").read_text() == "my work"


def test_a_remote_without_the_file_is_an_error(project):
    forget(project)
    objects(project, ".dvc-store")[0].unlink()

    with pytest.raises(DataError, match="dvc pull"):
        pull_missing(project.root)


def test_a_remote_that_is_gone_is_an_error(project):
    forget(project)
    shutil.rmtree(project.root / ".dvc-store")

    with pytest.raises(DataError, match="dvc pull"):
        pull_missing(project.root)


def test_a_damaged_remote_is_an_error(project):
    forget(project)
    damaged = objects(project, ".dvc-store")[0]
    damaged.chmod(0o644)
    damaged.write_bytes(b"other bytes")

    with pytest.raises(DataError):
        pull_missing(project.root)

    assert b"other bytes" not in [path.read_bytes() for path in project.data.glob("*")]


def test_status_tells_the_three_states(project):
    clean = status(project.root)
    assert (clean["state"], clean["differences"]) == ("clean", [])
    assert clean["rev"] == read_pin(project.root)

    (project.data / "prompts.jsonl").write_text("")
    dirty = status(project.root)
    assert dirty["state"] == "dirty"
    assert dirty["differences"] == ["changed: data/sample/prompts.jsonl"]

    shutil.rmtree(project.root / "data")
    assert status(project.root)["state"] == "missing"


def test_the_code_is_tagged_by_its_commit(project):
    clean = git_state(project.root)
    (project.root / "params" / "tiny.yaml").write_text("seed: 1\n")
    dirty = git_state(project.root)

    assert len(clean["git.commit"]) == 40
    assert clean["git.dirty"] == "false"
    assert dirty == {**clean, "git.dirty": "true"}


def test_outside_git_there_is_no_commit(tmp_path):
    assert git_state(tmp_path) == {}
