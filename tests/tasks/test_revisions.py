"""Tests of tasks.revisions, against git and DVC themselves."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from plumbline.errors import DataError, ParamsError, PlumblineError
from tasks.data_version import file_hashes, read_pin
from tasks.revisions import (
    commit_with_pin,
    fetch_commit,
    has_commit,
    pin_at,
    write_data,
    write_tree,
)

if TYPE_CHECKING:
    from tests.conftest import SmallProject


def git(root: Path, *arguments: str) -> str:
    settings = ("user.name=Test", "user.email=test@localhost", "commit.gpgsign=false")
    options = [part for setting in settings for part in ("-c", setting)]
    command = ["git", *options, *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def head(project: SmallProject) -> str:
    return git(project.root, "rev-parse", "HEAD").strip()


def change_data(project: SmallProject) -> None:
    """Add a row, and commit it as a user would."""
    rows = project.rows("prompts")
    project.write_rows("prompts", [*rows, {"prompt": "Is this new?"}])
    project.dvc("add", "data")
    git(project.root, "commit", "--quiet", "--all", "-m", "More data")


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its sha256 and the time of its last change."""
    return {
        str(path.relative_to(folder)): (
            f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_commit_is_known_by_its_hash_alone(project):
    assert has_commit(project.root, head(project))
    assert not has_commit(project.root, "0" * 40)
    for name in ("HEAD", "main", "", "--help", f"{head(project)} --help"):
        assert not has_commit(project.root, name)


def test_the_files_are_the_commit_s_and_not_the_working_tree_s(project, tmp_path):
    committed = (project.root / "params" / "tiny.yaml").read_text()
    (project.root / "params" / "tiny.yaml").write_text("seed: 7\n")
    (project.root / "params" / "new.yaml").write_text("seed: 8\n")

    write_tree(project.root, head(project), tmp_path)

    assert (tmp_path / "params" / "tiny.yaml").read_text() == committed
    assert not (tmp_path / "params" / "new.yaml").exists()
    assert (tmp_path / "data.dvc").is_file()
    assert not (tmp_path / "data").exists()


def test_a_commit_that_git_can_t_read_is_an_error(project, tmp_path):
    with pytest.raises(PlumblineError, match="git can't give the files of commit 0000"):
        write_tree(project.root, "0" * 40, tmp_path)


def test_a_version_of_the_data_is_found_in_the_commit_or_else_in_another(project):
    first, old = head(project), read_pin(project.root)
    change_data(project)
    new = read_pin(project.root)

    assert pin_at(project.root, first) == old != new == pin_at(project.root, head(project))
    assert commit_with_pin(project.root, first, old) == first
    assert commit_with_pin(project.root, first, new) == head(project)
    assert commit_with_pin(project.root, head(project), "0" * 32 + ".dir") is None


def test_the_run_s_own_commit_comes_before_a_newer_one_with_the_same_data(project):
    first, old = head(project), read_pin(project.root)
    git(project.root, "commit", "--quiet", "--allow-empty", "-m", "The same data")
    change_data(project)
    git(project.root, "revert", "--no-edit", "HEAD")

    assert pin_at(project.root, head(project)) == old
    assert commit_with_pin(project.root, first, old) == first
    assert commit_with_pin(project.root, head(project), old) == head(project)


@pytest.mark.parametrize("cache", ["with a cache", "without a cache"])
def test_old_data_is_written_elsewhere_and_here_nothing_changes(project, tmp_path, cache):
    first, old, hashes = head(project), read_pin(project.root), file_hashes(project.root / "data")
    change_data(project)
    if cache == "without a cache":
        shutil.rmtree(project.root / ".dvc" / "cache")
    before = contents(project.root)

    write_data(project.root, first, old, tmp_path)

    assert file_hashes(tmp_path / "data") == hashes != file_hashes(project.root / "data")
    assert read_pin(tmp_path) == old
    assert contents(project.root) == before


def test_data_that_nobody_has_is_an_error(project, tmp_path):
    shutil.rmtree(project.root / ".dvc" / "cache")
    shutil.rmtree(project.root / ".dvc-store")

    with pytest.raises(DataError, match="neither DVC's cache nor the remote"):
        write_data(project.root, head(project), read_pin(project.root), tmp_path)


def test_damaged_data_is_an_error(project, tmp_path):
    for store in (".dvc/cache", ".dvc-store"):
        for path in (project.root / store).rglob("*"):
            if path.is_file() and path.suffix != ".dir":
                path.chmod(0o644)
                path.write_bytes(b"{}\n")

    with pytest.raises(DataError, match="is damaged"):
        write_data(project.root, head(project), read_pin(project.root), tmp_path)


# Git refs.


def test_a_remote_s_branch_is_fetched_and_the_working_tree_stays(project, tmp_path):
    bare, other = tmp_path / "bare.git", tmp_path / "other"
    git(project.root, "clone", "--quiet", "--bare", ".", str(bare))
    git(project.root, "remote", "add", "origin", str(bare))
    git(tmp_path, "clone", "--quiet", str(bare), str(other))
    git(other, "commit", "--quiet", "--allow-empty", "-m", "Elsewhere")
    git(other, "push", "--quiet", "origin", "main")
    here = head(project)
    (project.root / "params" / "tiny.yaml").write_text("seed: 7\n")
    before = {name: text for name, text in contents(project.root).items() if ".git/" not in name}

    there = fetch_commit(project.root, "origin/main")

    assert there == git(other, "rev-parse", "HEAD").strip() != here
    assert fetch_commit(project.root, "main") == here == head(project)
    after = {name: text for name, text in contents(project.root).items() if ".git/" not in name}
    assert after == before


def test_a_branch_a_tag_and_a_commit_are_refs(project):
    git(project.root, "tag", "v1")

    refs = ("main", "v1", "HEAD", head(project), head(project)[:10])
    assert {fetch_commit(project.root, ref) for ref in refs} == {head(project)}


@pytest.mark.parametrize("ref", ["mian", "origin/main", "--all", "-v", "", "main --all"])
def test_a_ref_that_is_none_is_named_with_the_branches_there_are(project, ref):
    with pytest.raises(ParamsError, match=r"ref: expected a branch.*Branches: main"):
        fetch_commit(project.root, ref)


def test_a_remote_that_can_t_be_reached_is_an_error(project, tmp_path):
    git(project.root, "remote", "add", "origin", str(tmp_path / "nowhere"))

    with pytest.raises(DataError, match="See what `git fetch origin` says"):
        fetch_commit(project.root, "origin/main")
