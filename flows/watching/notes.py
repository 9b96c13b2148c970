"""Which versions of the data were announced, so that none starts two runs.

HOME/watch/EXPERIMENT.json has, for each source that is looked at, what was announced of it last,
and the version at which it was found unchanged last, as long as it stays there.
"""

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Note(BaseModel):
    """That a version of the data was announced."""

    model_config = ConfigDict(frozen=True)

    digest: str
    after: str
    """MLflow's id of the last run that had finished by then; empty where none had."""
    event: str
    """Id of the event."""
    when: str = Field(default_factory=_now)
    """UTC."""


class _File(BaseModel):
    """The notes of an experiment, by source."""

    announced: dict[str, Note] = {}
    unchanged: dict[str, str] = {}
    """Digest of what a source had when it was last looked at, if that was what was last trained."""


class WatchNotes:
    """What was announced for an experiment; to be used by one process at a time."""

    def __init__(self, home: Path, experiment: str) -> None:
        self._path = home / "watch" / f"{experiment}.json"
        try:
            self._file = _File.model_validate_json(self._path.read_bytes())
        except (OSError, ValidationError):
            self._file = _File()

    def find(self, source: str, digest: str, after: str) -> Note | None:
        """The note that this version was announced already; None where it was not.

        Args:
            source: where the version was seen.
            digest: of the data set.
            after: the last run that has finished.
        """
        own = self._file.announced.get(source)
        if own is not None and own.digest == digest:
            return own
        # Seen elsewhere first, and no run has finished since.
        notes = self._file.announced.values()
        return next((n for n in notes if (n.digest, n.after) == (digest, after)), None)

    def stayed(self, source: str, digest: str) -> bool:
        """Whether a source has the version still at which it was found unchanged.

        If that differs from what was last trained, it is since another source has changed.
        """
        return self._file.unchanged.get(source) == digest

    def write(self, source: str, note: Note) -> None:
        """Note that a version was announced."""
        unchanged = {name: seen for name, seen in self._file.unchanged.items() if name != source}
        self._replace({**self._file.announced, source: note}, unchanged)

    def write_unchanged(self, source: str, digest: str, after: str) -> None:
        """Note that a source has what was last trained, and forget what was announced of it before.

        Not while no run has finished since: one that failed would be started again if the version
        came back.
        """
        own = self._file.announced.get(source)
        over = own is not None and own.digest != digest and own.after != after
        if over or not self.stayed(source, digest):
            notes = self._file.announced.items()
            left = {name: note for name, note in notes if not (over and name == source)}
            self._replace(left, {**self._file.unchanged, source: digest})

    def _replace(self, announced: Mapping[str, Note], unchanged: Mapping[str, str]) -> None:
        self._file = _File(announced=dict(announced), unchanged=dict(unchanged))
        self._path.parent.mkdir(exist_ok=True)
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        aside.write_text(self._file.model_dump_json(indent=1) + "\n", encoding="utf-8")
        aside.replace(self._path)
