"""Which version each registry alias was last pointed to by a run, readable without MLflow."""

import json
import os
from pathlib import Path

FILE = "aliases.json"


def noted_version(home: Path, name: str, alias: str) -> str | None:
    """The version that the last run pointed the alias of a registered model to, if any did."""
    return _notes(home).get(f"{name}@{alias}")


def note_version(home: Path, name: str, alias: str, version: str) -> None:
    """Remember where the alias points now."""
    notes = {**_notes(home), f"{name}@{alias}": version}
    aside = home / f".{FILE}.{os.getpid()}"
    aside.write_text(json.dumps(notes, sort_keys=True, indent=1) + "\n")
    aside.replace(home / FILE)


def _notes(home: Path) -> dict[str, str]:
    try:
        notes = json.loads((home / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}
