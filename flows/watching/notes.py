"""Which versions of the data were announced, so that none starts two runs.

HOME/watch/EXPERIMENT.json has, for each source that is looked at, what was announced of it last.
"""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError


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


class _File(RootModel[dict[str, Note]]):
    """The notes of an experiment, by source."""


class WatchNotes:
    """What was announced for an experiment; to be used by one process at a time."""

    def __init__(self, home: Path, experiment: str) -> None:
        self._path = home / "watch" / f"{experiment}.json"
        try:
            self._notes = _File.model_validate_json(self._path.read_bytes()).root
        except (OSError, ValidationError):
            self._notes = {}

    def find(self, source: str, digest: str, after: str) -> Note | None:
        """The note that this version was announced already; None where it was not.

        Args:
            source: where the version was seen.
            digest: of the data set.
            after: the last run that has finished.
        """
        own = self._notes.get(source)
        if own is not None and own.digest == digest:
            return own
        # Seen elsewhere first, and no run has finished since.
        same = (n for n in self._notes.values() if (n.digest, n.after) == (digest, after))
        return next(same, None)

    def write(self, source: str, note: Note) -> None:
        """Note that a version was announced."""
        self._replace({**self._notes, source: note})

    def forget_if_over(self, source: str, digest: str, after: str) -> None:
        """Forget what was announced of a source that has another version now.

        Not while no run has finished since: one that failed would be started again if the version
        came back.
        """
        own = self._notes.get(source)
        if own is not None and own.digest != digest and own.after != after:
            self._replace({name: n for name, n in self._notes.items() if name != source})

    def _replace(self, notes: Mapping[str, Note]) -> None:
        self._path.parent.mkdir(exist_ok=True)
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        values = {source: note.model_dump() for source, note in notes.items()}
        aside.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        aside.replace(self._path)
        self._notes = dict(notes)
