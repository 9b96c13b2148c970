"""Tests of tasks.data_objects, against git and DVC themselves."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING

import pytest

from plumbline.errors import DataError, ParamsError
from tasks.data_objects import files_at, version_at
from tasks.data_version import (
    CACHE,
    STORE,
    current_version,
    file_hashes,
    object_path,
    read_pin,
    snapshot,
)

if TYPE_CHECKING:
    from tests.conftest import SmallProject

ROW = {"prompt": "Is this new?"}


def change_data(project: SmallProject) -> str:
    """Add a row as a user would; returns the new pin."""
    project.write_rows("prompts", [*project.rows("prompts"), ROW])
    project.dvc("add", "data")
    return read_pin(project.root)


def forget(project: SmallProject, *folders: str) -> None:
    for folder in folders:
        shutil.rmtree(project.root / folder)


def tree(project: SmallProject) -> dict[str, str]:
    """What a user sees: every file but git's and DVC's own, with its sha256."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in project.root.rglob("*")
        if path.is_file() and not {".git", ".dvc"} & set(path.parts)
    }


def test_the_pinned_version_is_the_one_in_data(project):
    expected = current_version(project.root, "data/sample")

    assert version_at(project.root, "data/sample", expected.rev) == expected


def test_an_edit_in_data_is_none_of_its_business(project, tmp_path):
    expected = current_version(project.root, "data/sample")
    (project.data / "prompts.jsonl").write_text("my work")
    (project.data / "demonstrations.jsonl").unlink()

    version = version_at(project.root, "data/sample", expected.rev)

    assert version == expected
    assert file_hashes(snapshot(project.root, version, tmp_path)) == expected.files
    assert (project.data / "prompts.jsonl").read_text() == "my work"


def test_data_that_is_nowhere_else_is_taken_as_it_lies_there(project):
    expected = current_version(project.root, "data/sample")
    forget(project, CACHE, STORE)

    assert version_at(project.root, "data/sample", expected.rev) == expected


@pytest.mark.parametrize("lost", [(), (CACHE,), (CACHE, STORE)], ids=str)
def test_an_earlier_version_comes_from_wherever_it_is(project, tmp_path, lost):
    old = current_version(project.root, "data/sample")
    change_data(project)
    # What is committed of the store is all that is left.
    forget(project, *lost)
    before = tree(project)

    version = version_at(project.root, "data/sample", old.rev)

    assert version == old
    assert file_hashes(snapshot(project.root, version, tmp_path)) == old.files
    assert tree(project) == before


def test_a_version_comes_from_dvc_s_remote(project, tmp_path):
    project.dvc("remote", "add", "--default", "far", str(tmp_path / "far"))
    new = change_data(project)
    expected = current_version(project.root, "data/sample")
    project.dvc("push")
    project.git("checkout", "--quiet", "data.dvc")
    forget(project, CACHE, STORE)

    assert version_at(project.root, "data/sample", new) == expected
    assert not (project.root / STORE).exists()


def test_a_version_that_nobody_has_is_an_error_that_says_what_to_do(project):
    new = change_data(project)
    forget(project, "data", CACHE)

    with pytest.raises(DataError, match="dvc push") as error:
        version_at(project.root, "data/sample", new)

    assert new in str(error.value)


def test_a_damaged_object_in_a_commit_is_not_taken(project):
    old = read_pin(project.root)
    for path in (project.root / STORE).rglob("*"):
        if path.is_file() and path.suffix != ".dir":
            path.chmod(0o644)
            path.write_bytes(b"other bytes")
    project.git("commit", "--quiet", "--all", "-m", "Damage")
    change_data(project)
    forget(project, CACHE, STORE)

    with pytest.raises(DataError):
        version_at(project.root, "data/sample", old)

    kept = [path for path in (project.root / CACHE).rglob("*") if path.is_file()]
    assert b"other bytes" not in [path.read_bytes() for path in kept]


@pytest.mark.parametrize("name", ["../../outside", "/outside", "sample/../../x"])
def test_a_list_with_names_outside_of_data_is_refused(project, name):
    listing = [{"md5": "d41d8cd98f00b204e9800998ecf8427e", "relpath": name}]
    content = json.dumps(listing, sort_keys=True).encode()
    pin = hashlib.md5(content).hexdigest() + ".dir"
    path = project.root / CACHE / object_path(pin)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)

    with pytest.raises(DataError, match="expected names below data/"):
        version_at(project.root, "data/sample", pin)


@pytest.mark.parametrize("pin", ["", "main", "../../etc/passwd", "0" * 32, "0" * 31 + "G.dir"])
def test_a_pin_that_is_none_is_refused(project, pin):
    with pytest.raises(ParamsError, match=r"data_rev: expected .* 32 hex digits"):
        version_at(project.root, "data/sample", pin)
    assert files_at(project.root, "data/sample", pin) is None


def test_the_files_of_a_version_are_known_without_the_files(project):
    old = current_version(project.root, "data/sample")
    change_data(project)
    for folder in (CACHE, STORE):
        for path in (project.root / folder).rglob("*"):
            if path.is_file() and path.suffix != ".dir":
                path.unlink()

    assert files_at(project.root, "data/sample", old.rev) == old.files
    assert files_at(project.root, "data/other", old.rev) is None
    assert files_at(project.root, "data/sample", "0" * 32 + ".dir") is None
