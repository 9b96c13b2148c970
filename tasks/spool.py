"""What a run has to tell MLflow waits on disk, and a thread of its own sends it.

Nothing that holds up MLflow, be it a server that is down or a locked database, holds up the
training; and what was not sent when a process was killed is sent at the next start.
"""

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any

from plumbline.errors import TrainingError
from plumbline.process import alive, identity
from tasks.faults import passing, root_cause
from tasks.progress import show_warning

log = logging.getLogger("plumbline")

SECONDS_BETWEEN_SENDS = 5.0
LINES_BETWEEN_SENDS = 20
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds between two attempts to reach MLflow; the last one again and again."""

Record = dict[str, Any]
"""One thing to tell MLflow; one line of JSON."""

Send = Callable[["Spool", Sequence[Record]], None]


class Spool:
    """The folder of what waits for a run: records.jsonl, and the files that records name.

    Records may be sent twice, where a process is killed between sending and forgetting them; what
    sends them makes nothing of the second time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_id = folder.name
        self.records = folder / "records.jsonl"

    def claim(self) -> None:
        """Make it this process's spool, until that dies."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = self.folder / f".owner-{os.getpid()}"
        aside.write_text(identity())
        aside.replace(self.folder / "owner")

    @property
    def orphaned(self) -> bool:
        """Whether the process that filled the spool is dead."""
        try:
            return alive((self.folder / "owner").read_text()) is False
        except OSError:
            return False

    @property
    def size(self) -> int:
        """Bytes of records."""
        try:
            return self.records.stat().st_size
        except FileNotFoundError:
            return 0

    def append(self, record: Record) -> None:
        """Add a record, whole or not at all."""
        left = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with self.records.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                # A disk that is all but full takes a part, and refuses the rest.
                while left:
                    left = left[file.write(left) :]
            except BaseException:
                file.truncate(before)
                raise

    def add_file(self, path: Path) -> Path:
        """Copy a file into the spool; returns its new path, below the folder."""
        folder = self.folder / "files" / f"{time.time_ns()}"
        folder.mkdir(parents=True)
        aside = folder / f".{path.name}"
        shutil.copyfile(path, aside)
        return aside.replace(folder / path.name).relative_to(self.folder)

    def read(self, start: int = 0) -> tuple[list[Record], int]:
        """The records from byte `start`, and where they end; a line cut short is none."""
        with contextlib.suppress(FileNotFoundError), self.records.open("rb") as file:
            file.seek(start)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            return [json.loads(line) for line in whole.splitlines()], start + len(whole)
        return [], start

    def clear(self) -> None:
        """Forget all records and their files: they were sent."""
        os.truncate(self.records, 0)
        shutil.rmtree(self.folder / "files", ignore_errors=True)

    def remove(self) -> None:
        """Remove the spool."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Outbox:
    """A run's spool with the thread that empties it."""

    def __init__(self, folder: Path, send: Send) -> None:
        self._spool = Spool(folder)
        self._spool.claim()
        self._send = send
        self._changed = threading.Condition()
        self._sent = 0
        self._new_lines = 0
        self._failures = 0
        self._urgent = False
        self._closed = False
        self._refused: Exception | None = None
        # In a copy of the context, so that Prefect knows whose words the thread logs.
        run = copy_context().run
        threading.Thread(target=run, args=(self._work,), name="outbox", daemon=True).start()

    def put(self, record: Record, file: Path | None = None) -> None:
        """Take a record, and a file that belongs to it.

        Raises:
            TrainingError: the disk is full.
            Exception: MLflow refused an earlier record.
        """
        with self._changed:
            self._raise_refusal()
            try:
                if file is not None:
                    record = {**record, "file": str(self._spool.add_file(file))}
                self._take(record)
            except OSError as error:
                raise TrainingError(
                    f"Can't write to {self._spool.folder} ({error.strerror}). Make room, then run "
                    "again: training resumes at its last checkpoint."
                ) from error

    def offer(self, record: Record) -> None:
        """Take a record that nothing depends on; where it can't be written, it is lost.

        A refusal is left for `put` and `settle`, whose callers are to hear of it.
        """
        with self._changed, contextlib.suppress(OSError):
            if not self._closed:
                self._take(record)

    def _take(self, record: Record) -> None:
        self._spool.append(record)
        self._new_lines += 1
        self._changed.notify_all()

    def settle(self, seconds: float) -> bool:
        """Wait until all is sent, at most so long; says whether it is.

        Raises:
            Exception: MLflow refused a record.
        """
        with self._changed:
            self._urgent = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._empty or self._refused, seconds)
            self._raise_refusal()
            return self._empty

    def close(self, seconds: float) -> bool:
        """Take no more, and wait at most so long; the thread goes on with what is left then.

        Raises:
            Exception: MLflow refused a record.
        """
        with self._changed:
            self._closed = True
        settled = self.settle(seconds)
        if settled:
            self._spool.remove()
        return settled

    @property
    def _empty(self) -> bool:
        return self._sent >= self._spool.size

    def _raise_refusal(self) -> None:
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused

    def _work(self) -> None:
        done = False
        while not done:
            with self._changed:
                self._changed.wait_for(self._due, self._pause())
                self._urgent = False
                self._new_lines = 0
            self._attempt()
            with self._changed:
                done = self._closed and self._empty
                if done:
                    self._spool.remove()
                elif self._empty and self._sent:
                    self._spool.clear()
                    self._sent = 0
                self._changed.notify_all()

    def _due(self) -> bool:
        return self._urgent or (self._new_lines >= LINES_BETWEEN_SENDS and not self._failures)

    def _pause(self) -> float:
        if not self._failures:
            return SECONDS_BETWEEN_SENDS
        return PAUSES[min(self._failures, len(PAUSES)) - 1]

    def _attempt(self) -> None:
        """Send what waits; what MLflow refuses is dropped, what does not reach it is kept."""
        records, end = self._spool.read(self._sent)
        try:
            if records:
                self._send(self._spool, records)
        except Exception as error:
            if passing(error):
                self._failures += 1
                if self._failures == 1:
                    self._say(f"MLflow does not answer ({root_cause(error)}); the run goes on")
                return
            self._refused = error
        if self._failures:
            self._failures = 0
            self._say(f"MLflow answers again: {len(records)} records that waited are sent")
        self._sent = end

    def _say(self, text: str) -> None:
        log.warning(text)
        show_warning(text)


def orphans(folder: Path) -> Iterator[Spool]:
    """The spools below a folder whose processes are dead."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        spool = Spool(path)
        if spool.orphaned:
            yield spool
