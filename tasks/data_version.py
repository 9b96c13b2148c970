"""The data as DVC pins it: pulled where it is missing, verified where it is there."""

import hashlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from plumbline.errors import DataError
from plumbline.refs import DataVersion

CACHE, STORE = ".dvc/cache", ".dvc-store"
"""Folders of the project with DVC's objects; those of the store are committed."""


def read_pin(root: Path) -> str:
    """The .dir hash that data.dvc pins.

    Raises:
        DataError: data.dvc is missing or not what `dvc add data` writes.
    """
    path = root / "data.dvc"
    try:
        pin = yaml.safe_load(path.read_text(encoding="utf-8"))["outs"][0]["md5"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"Can't read {path}: expected the file that `dvc add data` writes "
            f"({type(error).__name__}: {error}). Restore it with `git checkout data.dvc`."
        ) from error
    return str(pin)


def file_hashes(folder: Path) -> dict[str, str]:
    """md5 of each file below a folder, by its path in it."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "md5").hexdigest()
            hashes[path.relative_to(folder).as_posix()] = digest
    return hashes


def dir_hash(hashes: dict[str, str]) -> str:
    """The hash that DVC gives to a folder with these files."""
    listing = [{"md5": md5, "relpath": path} for path, md5 in sorted(hashes.items())]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def pinned_hashes(root: Path, pin: str) -> dict[str, str] | None:
    """md5 of each file of the pinned version; None where neither cache nor store has the list."""
    path = next(stored(root, pin), None)
    if path is None:
        return None
    return {row["relpath"]: row["md5"] for row in json.loads(path.read_bytes())}


def stored(root: Path, md5: str) -> Iterator[Path]:
    """Where DVC keeps the content of this md5, as far as it is on this machine."""
    for store in (CACHE, STORE):
        path = root / store / object_path(md5)
        if path.is_file():
            yield path


def object_path(md5: str) -> str:
    """Where a cache or a store of DVC keeps the content of this md5."""
    return f"files/md5/{md5[:2]}/{md5[2:]}"


def current_version(root: Path, path: str, *, allow_dirty: bool = False) -> DataVersion:
    """The version of the data set at `path` (data/NAME), verified against data.dvc.

    A process verifies a pinned version once: that the files are edited later, while it runs, is no
    fault, since it reads copies of the pinned ones (`snapshot`).

    Raises:
        DataError: the path is not below data/, the folder is missing, or the files are not the
            pinned ones and `allow_dirty` is off.
    """
    check_path(path)
    pin = read_pin(root)
    dirty = False
    try:
        hashes = _verified(root, pin)
    except _Differs as error:
        if not allow_dirty:
            raise DataError(_how_it_differs(root, pin, error.hashes)) from None
        hashes, dirty = error.hashes, True
    return data_set(hashes, path, pin, dirty=dirty)


def check_path(path: str) -> None:
    """Check that a path is one of a data set.

    Raises:
        DataError: it is not below data/.
    """
    relative = Path(path)
    if relative.is_absolute() or ".." in relative.parts or relative.parts[:1] != ("data",):
        raise DataError(
            f"data.path: expected a folder below data/, which data.dvc tracks, got {path!r}. "
            "Put the data set into data/NAME and run `dvc add data`."
        )
    if len(relative.parts) < 2:
        raise DataError(f"data.path: expected data/NAME, got {path!r}")


def data_set(hashes: Mapping[str, str], path: str, rev: str, *, dirty: bool = False) -> DataVersion:
    """The version of the data set at `path` among all files of data/.

    Raises:
        DataError: there is none.
    """
    relative = Path(path)
    prefix = relative.relative_to("data").as_posix() + "/"
    files = {name[len(prefix) :]: md5 for name, md5 in hashes.items() if name.startswith(prefix)}
    if not files:
        there = sorted({name.partition("/")[0] for name in hashes})
        raise DataError(
            f"There is no data set at {path}; data/ holds {', '.join(there) or 'nothing'}. "
            "Set data.path to one of these, import a data set with `plumbline data import`, or put "
            "your own there and run `dvc add data`."
        )
    name = relative.as_posix()
    return DataVersion(digest=dir_hash(files), path=name, rev=rev, files=files, dirty=dirty)


class _Differs(Exception):
    """data/ is not what data.dvc pins."""

    def __init__(self, hashes: dict[str, str]) -> None:
        super().__init__()
        self.hashes = hashes


@cache
def _verified(root: Path, pin: str) -> dict[str, str]:
    """The hashes of data/, which must be the pinned ones; what differs is looked at each time."""
    hashes = file_hashes(root / "data")
    if dir_hash(hashes) != pin:
        raise _Differs(hashes)
    return hashes


def in_place(root: Path, pin: str) -> dict[str, str] | None:
    """md5 of each file below data/ if that is this very version now, or else None."""
    hashes = file_hashes(root / "data")
    return hashes if dir_hash(hashes) == pin else None


def snapshot(root: Path, data: DataVersion, folder: Path) -> Path:
    """Copy the files of a version into `folder`, each verified as it is copied; returns the copy.

    A file that was edited meanwhile is taken from DVC's cache.

    Raises:
        DataError: DVC's cache does not have it, either.
    """
    copy = folder / data.path
    copy.mkdir(parents=True)
    for name, md5 in data.files.items():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        sources = (root / data.path / name, *stored(root, md5))
        if not any(_copy(source, target) == md5 for source in sources):
            raise DataError(
                f"{data.path}/{name} was edited while the run started, and DVC's cache does not "
                f"have it as it was: expected md5 {md5}. Run again, on the data as it is now."
            )
    return copy


def _copy(source: Path, target: Path) -> str | None:
    """Copy a file; returns the md5 of the bytes that were written, None if it can't be read."""
    digest = hashlib.md5()
    try:
        reading = source.open("rb")
    except OSError:
        return None
    with reading, target.open("wb") as writing:
        while chunk := reading.read(2**20):
            digest.update(chunk)
            writing.write(chunk)
    return digest.hexdigest()


def pull_missing(root: Path) -> bool:
    """Fetch the files of data.dvc that are missing, and verify them; True if any was missing.

    Files that are there and differ are left alone: `current_version` reports them.

    Raises:
        DataError: the remote does not have them, or what it has is damaged.
    """
    pin = read_pin(root)
    try:
        _verified(root, pin)
        return False
    except _Differs as error:
        hashes = error.hashes
    pinned = pinned_hashes(root, pin)
    if pinned is not None and set(pinned) <= set(hashes):
        return False
    if pinned is not None and any(
        pinned.get(name) not in (None, md5) for name, md5 in hashes.items()
    ):
        # A pull would stop at the edited files, or discard them.
        raise DataError(_how_it_differs(root, pin, hashes))
    _pull(root)
    return True


def _pull(root: Path) -> None:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from scmrepo.exceptions import SCMError

    try:
        with Repo(str(root)) as repo:
            repo.pull(targets=[str(root / "data.dvc")])
    except (DvcException, SCMError, OSError) as error:
        raise DataError(
            f"Can't pull the data that data.dvc pins: {error}. Check `dvc remote list` and that "
            "the remote can be reached, then try `dvc pull data.dvc`."
        ) from error


def add_data(root: Path) -> str:
    """Have data.dvc pin data/ as it is now, as `dvc add data` does; returns the new pin.

    Raises:
        DataError: DVC can't.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from scmrepo.exceptions import SCMError

    try:
        with Repo(str(root)) as repo:
            # The caller says what to commit.
            repo.scm_context.quiet = True
            repo.add(str(root / "data"))
    except (DvcException, SCMError, OSError) as error:
        raise DataError(
            f"Can't add data/ to DVC: {error}. See what `dvc add data` says, then try again."
        ) from error
    return read_pin(root)


def store_in_project(root: Path) -> str | None:
    """The folder of the default remote where it lies in the project, to be committed with it."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        remote = repo.config["core"].get("remote")
        url = Path(repo.config["remote"].get(remote, {}).get("url", ""))
    return url.relative_to(root).as_posix() if url.is_relative_to(root) else None


def git_state(root: Path) -> dict[str, str]:
    """Commit and dirty flag of the code, as tags; empty outside a git repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return {
            "git.commit": git("rev-parse", "HEAD"),
            "git.dirty": str(bool(git("status", "--porcelain", "--untracked-files=no"))).lower(),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}


def status(root: Path) -> dict[str, Any]:
    """What data.dvc pins and how data/ differs from it: rev, files, state, differences."""
    pin = read_pin(root)
    hashes = file_hashes(root / "data")
    pinned = pinned_hashes(root, pin)
    state = "clean" if dir_hash(hashes) == pin else "missing" if not hashes else "dirty"
    return {
        "rev": pin,
        "state": state,
        "files": hashes,
        "differences": [] if state == "clean" else _differences(pinned, hashes),
    }


def _differences(pinned: dict[str, str] | None, hashes: dict[str, str]) -> list[str]:
    if pinned is None:
        return []
    return [
        *(f"missing: data/{name}" for name in sorted(set(pinned) - set(hashes))),
        *(f"new: data/{name}" for name in sorted(set(hashes) - set(pinned))),
        *(
            f"changed: data/{name}"
            for name in sorted(set(hashes) & set(pinned))
            if hashes[name] != pinned[name]
        ),
    ]


def _how_it_differs(root: Path, pin: str, hashes: dict[str, str]) -> str:
    lines = _differences(pinned_hashes(root, pin), hashes)
    return "\n".join(
        [
            f"data/ is not what data.dvc pins: expected {pin}, got {dir_hash(hashes)}.",
            *(f"  {line}" for line in lines),
            "To keep your edits, check them with `plumbline data check`, run `dvc add data` and "
            "commit data.dvc. To go back, run `dvc checkout --force data.dvc`, which discards "
            "them. To run on them as they are, pass --allow-dirty.",
        ]
    )
