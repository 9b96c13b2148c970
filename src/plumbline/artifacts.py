"""Folders that appear whole or not at all, manifests of what is in them, and what is damaged."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from plumbline.refs import FileDigest, file_digest

MANIFEST = "manifest.json"
"""Beside the files of a folder: the sha256 and the size of each."""
SECONDS_UNTIL_SETTLED = 2.0
"""A file that changed less long ago may change once more within the same tick of its times."""

Hasher = Callable[[Path], str]
"""Takes a file; returns the sha256 of its bytes, in hex."""

_manifest: TypeAdapter[dict[str, FileDigest]] = TypeAdapter(dict[str, FileDigest])


class Fault(NamedTuple):
    """One thing that is wrong with something stored."""

    path: Path
    what: str
    """What became of it: "is gone", "was cut short" …"""
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.path} {self.what}: expected {self.expected}, got {self.got}"


def partial_folder(target: Path) -> Path:
    """Where a folder is written until it is whole; on the same file system, or no rename could."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, which appears at `target` as the context ends, synced to the disk.

    After an error nothing is left; a process that is killed leaves the partial folder at most.

    Raises:
        OSError: `target` is there already, or the disk is full.
    """
    aside = partial_folder(target)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_folder(aside)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync(target.parent)


def write_manifest(folder: Path) -> dict[str, FileDigest]:
    """Write the manifest of all files in a folder; returns it, a relative path to its digest."""
    files = {
        path.relative_to(folder).as_posix(): digest_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    (folder / MANIFEST).write_bytes(_manifest.dump_json(files, indent=1) + b"\n")
    return files


def read_manifest(folder: Path) -> dict[str, FileDigest]:
    """The manifest of a folder; empty where it has none that can be read."""
    try:
        return _manifest.validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return {}


def digest_of(path: Path) -> FileDigest:
    """The sha256 and the size of a file."""
    return FileDigest(sha256=file_digest(path), size=path.stat().st_size)


def file_fault(path: Path, expected: FileDigest | str | None, hasher: Hasher) -> Fault | None:
    """What is wrong with a file; None if nothing is.

    Args:
        path: the file.
        expected: what is known of it: sha256 and size, the sha256, or that it is there.
        hasher: of files.
    """
    try:
        if not path.is_file():
            return Fault(path, "is gone", "a file", "none")
        size = path.stat().st_size
        if isinstance(expected, FileDigest) and size != expected.size:
            what = "was cut short" if size < expected.size else "has grown"
            return Fault(path, what, f"{expected.size} bytes", f"{size} bytes")
        sha256 = expected.sha256 if isinstance(expected, FileDigest) else expected
        digest = hasher(path) if sha256 else None
    except OSError as error:
        return Fault(path, "can't be read", "a file", str(error.strerror))
    if digest != sha256:
        got = f"{digest} in {size} bytes"
        return Fault(path, "does not match its digest", f"sha256 {sha256}", got)
    return None


class DigestCache:
    """Digests of files that have not been touched since they were hashed.

    A file counts as untouched while its size, times and inode are what they were. What can't be
    read from the cache's own file costs a hash, nothing else: processes that write it at the same
    time may lose each other's entries.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._read()
        self._new: dict[str, list[int | str]] = {}

    def __call__(self, path: Path) -> str:
        """sha256 of a file's bytes, in hex; a `Hasher`."""
        before = _touched(path)
        known = self._known.get(str(path))
        if known is not None and known[:-1] == before:
            return str(known[-1])
        digest = file_digest(path)
        if _touched(path) == before and _settled(path):
            self._known[str(path)] = self._new[str(path)] = [*before, digest]
        return digest

    def save(self) -> None:
        """Add what was hashed to the cache's file; a disk that is full or read-only is no error."""
        if not self._new:
            return
        kept = {name: entry for name, entry in self._read().items() if Path(name).exists()}
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with suppress(OSError):
            aside.write_text(json.dumps(kept | self._new))
            aside.replace(self._path)
            self._new = {}

    def _read(self) -> dict[str, list[int | str]]:
        try:
            stored = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        if not isinstance(stored, dict):
            return {}
        return {name: entry for name, entry in stored.items() if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 5 and isinstance(entry[-1], str)


def _touched(path: Path) -> list[int | str]:
    """What changes as a file is written to or replaced; a program can set mtime, but not ctime."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _settled(path: Path) -> bool:
    state = path.stat()
    return time.time() - max(state.st_mtime, state.st_ctime) > SECONDS_UNTIL_SETTLED


def sync_folder(folder: Path) -> None:
    """Wait until a folder and all that is in it are on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    A rename may otherwise outlive the bytes in a power cut.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
