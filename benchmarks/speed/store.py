"""The file of measurements, from which the tables are made and an interrupted run goes on."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self


class Measurement(NamedTuple):
    """What one process has measured, and when."""

    part: str
    side: str
    turn: int
    key: str
    """Digest of the spec, of the library's code and of the machine."""
    commit: str
    at: str
    """UTC, when it ended."""
    seconds: float
    """Of the whole process."""
    others: float
    """Share of the machine that other processes took meanwhile."""
    result: dict[str, Any]


class Store:
    """Measurements in a JSON file; what is added is on disk when the call returns."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        """Read the file where there is one; `machine` describes where new ones are made."""
        self.path = path
        self.machine = machine
        self.measurements: list[Measurement] = []
        if path.is_file():
            content = json.loads(path.read_bytes())
            self.measurements = [Measurement(**row) for row in content["measurements"]]
            self.machine = machine or content["machine"]

    @classmethod
    def read(cls, path: Path) -> Self:
        """The file as it is, for tables."""
        return cls(path, {})

    def find(self, part: str, side: str, turn: int, key: str) -> Measurement | None:
        """The measurement with this key, if it was made."""
        places = (m for m in self.measurements if (m.part, m.side, m.turn) == (part, side, turn))
        return next((m for m in places if m.key == key), None)

    def add(self, new: Measurement) -> None:
        """Put it in the place of an older one of this part, side and turn."""
        place = new[:3]
        self.measurements = [m for m in self.measurements if m[:3] != place] + [new]
        self._write()

    def keep(self, part: str, places: Iterable[tuple[str, int]]) -> None:
        """Forget the sides and turns of a part that it no longer has."""
        wanted = set(places)
        kept = [m for m in self.measurements if m.part != part or (m.side, m.turn) in wanted]
        if len(kept) < len(self.measurements):
            self.measurements = kept
            self._write()

    def of(self, part: str) -> list[Measurement]:
        """All of a part."""
        return [m for m in self.measurements if m.part == part]

    def _write(self) -> None:
        rows = sorted(self.measurements, key=lambda m: m[:3])
        content = {"machine": self.machine, "measurements": [row._asdict() for row in rows]}
        write_text(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write the file aside first, so that it is never there by half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def digest(*values: Any) -> str:
    """A short digest of JSON values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
