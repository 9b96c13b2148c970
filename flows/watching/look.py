"""Whether the data differs from what an experiment was last trained on, and what to do about it.

One look works without a server. To be imported once PREFECT_API_URL names the one that is to hear
of it, where there is one.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from flows.watching.found import WORK_TREE, FileChange, Found, PlannedStep, State, Trained
from flows.watching.notes import Note, WatchNotes
from plumbline.errors import DataError
from plumbline.params.loader import Loaded, load_experiment
from plumbline.project import Project
from plumbline.refs import DataVersion
from tasks.data_objects import files_at, version_at
from tasks.data_version import read_pin, stored
from tasks.locks import step_lock
from tasks.past_runs import PastRun, last_on_pinned_data, under_way_on_pinned_data
from tasks.revisions import fetch_commit, pin_at

COUNTED_BYTES = 2**28
"""Rows of larger files are not counted."""

Announce = Callable[[Found], str]
"""Tells the world of a change; returns the id of the event."""


def watch(
    project: Project,
    experiment: str,
    ref: str = "",
    *,
    again: bool = False,
    announce: Announce | None = None,
) -> Found:
    """Look whether the data differs from what an experiment was last trained on.

    A version is announced once for each time that it appears, and only if its rows are valid. A
    source that has not changed announces nothing where a change of another one was trained.

    Args:
        project: the project; its working tree stays as it is.
        experiment: a file in params/, by name or path.
        ref: a git ref, fetched if it is a remote's, whose data.dvc counts; else the work tree's.
        again: announce a version also if it was announced before.
        announce: is called with a change that is to be announced; none is to say only what it is.

    Raises:
        InvalidData: rows of the changed data break rules.
        DataError: the data can't be had, or the git remote can't be reached.
        ParamsError: there is no such experiment or ref.
    """
    loaded = load_experiment(experiment, project.params)
    with step_lock(project.home, f"watch-{loaded.name}"):
        found, data = _look(project, loaded, ref)
        notes = WatchNotes(project.home, loaded.name)
        after = found.trained.run_id if found.trained else ""
        if data is None:
            notes.write_unchanged(found.source, found.digest, after)
            return found
        if notes.stayed(found.source, found.digest) and not again:
            return found.model_copy(update={"state": "superseded"})
        note = notes.find(found.source, found.digest, after)
        if note is not None and not again:
            return found.model_copy(update={"state": "announced before", "event": note.event})
        if found.state == "under way":
            return found
        found = _examined(project, loaded, found, data)
        if announce is None:
            return found
        event = announce(found)
        notes.write(found.source, Note(digest=found.digest, after=after, event=event))
        return found.model_copy(update={"state": "announced", "event": event})


def _look(project: Project, loaded: Loaded, ref: str) -> tuple[Found, DataVersion | None]:
    """What data.dvc pins, against the last finished run and those under way.

    The data comes with it where it differs.
    """
    commit = fetch_commit(project.root, ref) if ref else None
    pin = _pin(project.root, ref, commit)
    trained = _trained(last_on_pinned_data(loaded.name))
    found = Found(
        experiment=loaded.name,
        state="unchanged",
        source=ref or WORK_TREE,
        commit=commit,
        dataset=loaded.experiment.data.path,
        rev=pin,
        digest=trained.digest if trained else "",
        trained=trained,
    )
    if trained and trained.rev == pin:
        return found, None
    data = version_at(project.root, loaded.experiment.data.path, pin, commit)
    if trained and trained.digest == data.digest:
        # Another data set of data/ has changed.
        return found, None
    busy = any(
        run.tags.get("data.digest") == data.digest for run in under_way_on_pinned_data(loaded.name)
    )
    state: State = "under way" if busy else "changed"
    return found.model_copy(update={"state": state, "digest": data.digest}), data


def _pin(root: Path, ref: str, commit: str | None) -> str:
    if commit is None:
        return read_pin(root)
    pin = pin_at(root, commit)
    if pin is None:
        raise DataError(
            f"{ref} ({commit[:12]}) has no data.dvc that `dvc add data` wrote: expected one at the "
            "project's root. Name a ref that has it."
        )
    return pin


def _trained(run: PastRun | None) -> Trained | None:
    if run is None:
        return None
    tags = run.tags
    return Trained(
        run_id=run.run_id, run=run.name, rev=tags["data.rev"], digest=tags["data.digest"]
    )


def _examined(project: Project, loaded: Loaded, found: Found, data: DataVersion) -> Found:
    """A change with all that is to be said of it, once its rows are known to be valid."""
    # They import PyTorch, which a look that finds nothing need not wait for.
    from flows.alignment.planning import make_plan
    from flows.data.checking import check_version
    from plumbline.data.validation import failures_table

    prepared = check_version(project, loaded.experiment, data)
    trained = found.trained
    old = files_at(project.root, data.path, trained.rev) if trained else {}
    steps = make_plan(project, loaded.experiment, data)
    return found.model_copy(
        update={
            "files": differences(project.root, old, data.files),
            "steps": {name: PlannedStep(**step._asdict()) for name, step in steps.items()},
            "set_aside": failures_table(prepared.failures),
        }
    )


def differences(
    root: Path, old: Mapping[str, str] | None, new: Mapping[str, str]
) -> list[FileChange]:
    """The files that differ between two versions of a data set, by their paths in it.

    Args:
        root: the project's folder.
        old: md5 of each file before; None where that is not known.
        new: md5 of each file now.
    """
    before = dict.fromkeys(new) if old is None else old
    changes = []
    for path in sorted({*before, *new}):
        was, now = before.get(path), new.get(path)
        if was != now:
            change = FileChange(
                path=path,
                change="removed" if now is None else "changed" if path in before else "added",
                old_md5=was,
                new_md5=now,
                old_rows=_rows(root, path, was),
                new_rows=_rows(root, path, now),
            )
            changes.append(change)
    return changes


def _rows(root: Path, path: str, md5: str | None) -> int | None:
    """How many rows a file has; None where to count them would take long, or it is not here."""
    content = next(stored(root, md5), None) if md5 else None
    if content is None or content.stat().st_size > COUNTED_BYTES:
        return None
    if path.endswith(".jsonl"):
        with content.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    if path.endswith(".parquet"):
        from pyarrow import ArrowException
        from pyarrow.parquet import read_metadata

        try:
            return int(read_metadata(content).num_rows)
        except ArrowException:
            return None
    return None
