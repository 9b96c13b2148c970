"""Which version each registry alias was last pointed to by a run, readable without MLflow.

A note is made once the run is over: what it says, no kill can have left half done.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tasks.locks import step_lock

FILE = "aliases.json"


def noted_version(home: Path, name: str, alias: str) -> str | None:
    """The version that the last run pointed the alias of a registered model to, if any did."""
    return _notes(home).get(f"{name}@{alias}")


def move_alias(home: Path, name: str, alias: str, move: Callable[[], None]) -> None:
    """Forget where the alias points, and let `move` point it elsewhere."""
    with step_lock(home, "aliases"):
        notes = _notes(home)
        if notes.pop(f"{name}@{alias}", None) is not None:
            _write(home, notes)
        move()


def note_version(
    home: Path, name: str, alias: str, version: str, current: Callable[[str, str], str | None]
) -> None:
    """Remember where the alias points, unless another run has pointed it elsewhere since.

    Args:
        home: the project's folder for generated files.
        name, alias: of a registered model.
        version: that this process has pointed it to.
        current: asks the registry where an alias of a model points.
    """
    with step_lock(home, "aliases"), suppress(OSError):
        if current(name, alias) == version:
            _write(home, {**_notes(home), f"{name}@{alias}": version})


def _write(home: Path, notes: dict[str, str]) -> None:
    aside = home / f".{FILE}.{os.getpid()}"
    aside.write_text(json.dumps(notes, sort_keys=True, indent=1) + "\n")
    aside.replace(home / FILE)


def _notes(home: Path) -> dict[str, str]:
    try:
        notes = json.loads((home / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}
