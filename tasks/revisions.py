"""A project as it was at a commit: its files from git and its data from DVC, in another folder.

The working tree is neither read nor changed.
"""

import os
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import yaml

from plumbline.errors import DataError, ParamsError, PlumblineError
from tasks.data_version import dir_hash, file_hashes

COMMIT = re.compile(r"[0-9a-f]{7,64}")
FETCH_SECONDS = 300.0


def has_commit(root: Path, commit: str) -> bool:
    """Whether the repository around `root` has this commit."""
    return COMMIT.fullmatch(commit) is not None and (
        _git(root, "cat-file", "-e", f"{commit}^{{commit}}").returncode == 0
    )


def write_tree(root: Path, commit: str, to: Path) -> None:
    """Write the files of a commit, those below `root`, into the folder `to`.

    Raises:
        PlumblineError: git can't read the commit.
    """
    command = ["git", "-C", str(root), "archive", "--format=tar", commit]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as git:
        assert git.stdout is not None
        assert git.stderr is not None
        broken = ""
        try:
            with tarfile.open(fileobj=git.stdout, mode="r|") as files:
                files.extractall(to, filter="data")
        except tarfile.TarError as error:
            broken = str(error)
            git.stdout.close()
        said = git.stderr.read().decode(errors="replace").strip()
    if git.returncode != 0 or broken:
        raise PlumblineError(
            f"git can't give the files of commit {commit}: {said or broken}. "
            f"See what `git archive {commit[:12]}` says."
        )


def pin_at(root: Path, commit: str) -> str | None:
    """The .dir hash that data.dvc pins at a commit; None where it pins none."""
    try:
        return str(yaml.safe_load(_pin_file(root, commit))["outs"][0]["md5"])
    except (yaml.YAMLError, KeyError, IndexError, TypeError):
        return None


def commit_with_pin(root: Path, commit: str, pin: str) -> str | None:
    """A commit whose data.dvc pins this version: `commit` itself, or else the newest; or None."""
    if pin_at(root, commit) == pin:
        return commit
    log = _git(root, "log", "--all", "--full-history", "--format=%H", "--", "data.dvc")
    commits = log.stdout.decode().split()
    return next((other for other in commits if pin_at(root, other) == pin), None)


def write_data(root: Path, commit: str, pin: str, to: Path) -> None:
    """Write data.dvc and data/ as a commit pins them into the folder `to`, verified.

    Raises:
        DataError: neither DVC's cache nor the remote has the files, or they are damaged.
    """
    (to / "data.dvc").write_bytes(_pin_file(root, commit))
    _fetch(root, commit, to)
    got = dir_hash(file_hashes(to / "data"))
    if got != pin:
        raise DataError(
            f"The data that data.dvc pins at commit {commit[:12]} is damaged: expected {pin}, got "
            f"{got} from DVC's cache and remote. Push it again from a machine that has it whole."
        )


def _fetch(root: Path, commit: str, to: Path) -> None:
    from dvc.api import DVCFileSystem

    try:
        files: Any = DVCFileSystem(str(root), rev=commit)
        for name in sorted(files.find("data")):
            target = to / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(name, str(target))
    # Each library below DVC raises errors of its own, and they have no base in common.
    except Exception as error:
        raise DataError(
            f"Can't get the data that data.dvc pins at commit {commit[:12]}: neither DVC's cache "
            f"nor the remote gives it ({type(error).__name__}: {error}). Run `dvc push "
            "--all-commits` where it is, or check `dvc remote list`, then try again."
        ) from error


def fetch_commit(root: Path, ref: str) -> str:
    """The commit that a git ref names, once it is fetched where it is a remote's branch.

    Of the user's repository nothing changes but what git knows of that remote.

    Raises:
        ParamsError: there is no such ref.
        DataError: its remote can't be reached.
    """
    remotes = _git(root, "remote").stdout.decode().split()
    remote = next((name for name in remotes if ref.startswith(f"{name}/")), None)
    if remote is not None:
        _fetch_remote(root, remote)
    # A name that begins with a dash would be read as an option.
    named = "" if ref.startswith("-") else f"{ref}^{{commit}}"
    found = _git(root, "rev-parse", "--verify", "--quiet", named)
    if found.returncode != 0:
        branches = _git(root, "branch", "--all", "--format=%(refname:short)").stdout.decode()
        raise ParamsError(
            f"ref: expected a branch, a tag or a commit of this repository, got {ref!r}. Branches: "
            f"{', '.join(branches.split()) or 'none'}"
        )
    return found.stdout.decode().strip()


def _fetch_remote(root: Path, remote: str) -> None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "fetch", "--quiet", remote],
            # Nobody is there to be asked for a password.
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=FETCH_SECONDS,
            check=False,
        )
        said = done.stderr.decode(errors="replace").strip() if done.returncode else None
    except subprocess.TimeoutExpired:
        said = f"no answer within {FETCH_SECONDS:.0f} s"
    if said is not None:
        raise DataError(
            f"Can't fetch from the git remote {remote}: {said}. See what `git fetch {remote}` "
            "says; it has to work without asking for anything."
        )


def _pin_file(root: Path, commit: str) -> bytes:
    return _git(root, "show", f"{commit}:./data.dvc").stdout


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
