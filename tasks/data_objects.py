"""Any version of the data, whatever is in data/: DVC's cache has its files, or is given them.

Neither data/ nor any other file of the user's working tree is changed.
"""

import hashlib
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from plumbline.errors import DataError, ParamsError
from plumbline.refs import DataVersion
from tasks.data_version import (
    CACHE,
    STORE,
    check_path,
    data_set,
    dir_hash,
    in_place,
    object_path,
    pinned_hashes,
    stored,
)
from tasks.revisions import commit_with_pin

PIN = re.compile(r"[0-9a-f]{32}\.dir")
MD5 = re.compile(r"[0-9a-f]{32}")


def version_at(root: Path, path: str, pin: str, commit: str | None = None) -> DataVersion:
    """The version of the data set at `path` (data/NAME) in a version of data/, ready to be copied.

    What of it is not on this machine goes into DVC's cache: from the store that is committed, or
    else from DVC's remote.

    Args:
        root: the project's folder.
        path: of the data set.
        pin: the .dir hash of the version, as data.dvc has it.
        commit: one whose data.dvc pins that version; it is looked for where none is given.

    Raises:
        ParamsError: the pin is none.
        DataError: the version can't be had whole, or has no such data set.
    """
    check_path(path)
    if not PIN.fullmatch(pin):
        raise ParamsError(
            f"data_rev: expected a version of the data as data.dvc names it, 32 hex digits and "
            f".dir, got {pin!r}. `plumbline data status` prints the one that is pinned here."
        )
    hashes = _whole(root, pin) or in_place(root, pin)
    if hashes is None:
        _fetch_listing(root, pin, commit)
        hashes = _checked_listing(root, pin)
        _fetch(root, pin, _missing(root, hashes.values()), commit)
        if missing := _missing(root, hashes.values()):
            raise _lost(pin, missing)
    return data_set(hashes, path, pin)


def files_at(root: Path, path: str, pin: str) -> dict[str, str] | None:
    """md5 of each file of a data set in a version of data/, by its path in the set.

    None where nobody has the list any more; the files themselves need not be there.
    """
    if not PIN.fullmatch(pin):
        return None
    try:
        _fetch_listing(root, pin, None)
        return data_set(_checked_listing(root, pin), path, pin).files
    except DataError:
        return None


def _whole(root: Path, pin: str) -> dict[str, str] | None:
    """The files of a version that is on this machine, or None."""
    if next(stored(root, pin), None) is None:
        return None
    hashes = _checked_listing(root, pin)
    return None if _missing(root, hashes.values()) else hashes


def _checked_listing(root: Path, pin: str) -> dict[str, str]:
    """The files of a version by the list that is on this machine, which may come from anywhere."""
    hashes = pinned_hashes(root, pin)
    if hashes is None:
        raise _lost(pin, [pin])
    good = all(MD5.fullmatch(md5) and _is_below(name) for name, md5 in hashes.items())
    if not good or dir_hash(hashes) != pin:
        raise DataError(
            f"DVC's list of the files of {pin} is damaged: expected names below data/ with their "
            f"md5, and the hash {pin}, got {dir_hash(hashes)}. Remove {CACHE}/{object_path(pin)}, "
            "then try again."
        )
    return hashes


def _is_below(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts


def _missing(root: Path, md5s: Iterable[str]) -> list[str]:
    return [md5 for md5 in dict.fromkeys(md5s) if next(stored(root, md5), None) is None]


def _lost(pin: str, md5s: list[str]) -> DataError:
    shown = ", ".join(md5s[:3]) + (" …" if len(md5s) > 3 else "")
    return DataError(
        f"The data {pin} can't be had: expected {len(md5s)} objects ({shown}) in {CACHE}, {STORE} "
        "or DVC's default remote, and none of them has these. Run `dvc push` where the data is, "
        "and commit the store if it is part of the repository; then try again."
    )


def _fetch_listing(root: Path, pin: str, commit: str | None) -> None:
    _fetch(root, pin, _missing(root, [pin]), commit)


def _fetch(root: Path, pin: str, md5s: list[str], commit: str | None) -> None:
    """Put objects into DVC's cache, as far as a commit or the remote has them."""
    if not md5s:
        return
    source = commit or commit_with_pin(root, "HEAD", pin)
    left = [md5 for md5 in md5s if source is None or not _take_from_commit(root, source, md5)]
    if left:
        _pull(root, pin, left)


def _take_from_commit(root: Path, commit: str, md5: str) -> bool:
    """Copy an object out of the store as a commit has it into DVC's cache; True if it has it."""
    target = root / CACHE / object_path(md5)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    name = f"{commit}:./{STORE}/{object_path(md5)}"
    try:
        with aside.open("wb") as file:
            command = ["git", "-C", str(root), "cat-file", "blob", name]
            done = subprocess.run(command, stdout=file, stderr=subprocess.DEVNULL, check=False)
        with aside.open("rb") as file:
            got = hashlib.file_digest(file, "md5").hexdigest()
        if done.returncode != 0 or got != md5.removesuffix(".dir"):
            return False
        # As DVC leaves them.
        aside.chmod(0o444)
        aside.replace(target)
        return True
    finally:
        aside.unlink(missing_ok=True)


def _pull(root: Path, pin: str, md5s: list[str]) -> None:
    from dvc.repo import Repo
    from dvc_data.hashfile.hash_info import HashInfo

    try:
        with Repo(str(root)) as repo:
            repo.cloud.pull({HashInfo("md5", md5) for md5 in md5s})
    # Each library below DVC raises errors of its own, and they have no base in common.
    except Exception as error:
        raise DataError(
            f"Can't get the data {pin} from DVC's default remote ({type(error).__name__}: "
            f"{error}). Check `dvc remote list` and that the remote can be reached, then try again."
        ) from error
