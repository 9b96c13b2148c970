"""Where things are: the project's root, and the one folder for all that is generated."""

import os
from pathlib import Path
from typing import NamedTuple

from plumbline.errors import MachineError, PlumblineError


class Project(NamedTuple):
    """The folders of a project."""

    root: Path
    """Holds params/, data.dvc and the code."""
    home: Path
    """Holds all that is generated: .plumbline/, or what PLUMBLINE_HOME names."""

    @property
    def params(self) -> Path:
        """The experiments."""
        return self.root / "params"

    @property
    def results(self) -> Path:
        """The records of finished steps, one file a cache key."""
        return self.home / "results"

    @property
    def reports(self) -> Path:
        """Figures and summaries, one folder a run."""
        return self.home / "reports"


def find_project(start: Path | None = None) -> Project:
    """The project that `start` (the working directory) is in, or else the one this code is in.

    Raises:
        PlumblineError: neither lies in a project.
    """
    here = (start or Path.cwd()).resolve()
    for root in (here, *here.parents, *Path(__file__).resolve().parents):
        if (root / "params").is_dir() and (root / "data.dvc").is_file():
            return Project(root, home_of(root))
    raise PlumblineError(
        f"{here} is not in a Plumbline project: expected a folder with params/ and data.dvc in it "
        "or above it. Change into the project's folder."
    )


def home_of(root: Path) -> Path:
    """The folder for generated files: PLUMBLINE_HOME, from the working directory, or .plumbline."""
    chosen = os.environ.get("PLUMBLINE_HOME")
    return Path(chosen).expanduser().resolve() if chosen else root / ".plumbline"


def make_home(home: Path) -> None:
    """Make the folder for generated files, for this user alone, and try whether it takes a file.

    Raises:
        MachineError: it can't be made or written to.
    """
    probe = home / f".writable-{os.getpid()}"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        (home / "results").mkdir(exist_ok=True, mode=0o700)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise MachineError(
            f"Can't write to {home} ({error.strerror}): expected a folder that this user can write "
            "to. Mend its permissions, or set PLUMBLINE_HOME to another folder."
        ) from error
