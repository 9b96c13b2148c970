"""Import of public data: read, converted, validated aside, moved into data/, pinned by DVC."""

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from plumbline.data.convert import FORMATS, Format, Row, guess_format, tables_of
from plumbline.data.formats import OPTIONAL_TABLES, TABLES, find_table
from plumbline.data.selection import (
    TEST_FRACTION,
    LeftOut,
    Selection,
    count_reasons,
    select,
    write_left_out,
)
from plumbline.data.sources import HubOptions, Record, read_source
from plumbline.data.validation import (
    InvalidData,
    empty_splits,
    format_report,
    read_dataset,
    validate,
)
from plumbline.errors import DataError, MachineError, ParamsError
from plumbline.project import Project
from tasks.data_version import add_data, pull_missing, status, store_in_project

REASONS_SHOWN = 12


class Imported(NamedTuple):
    """What an import did, for its report."""

    path: str
    """data/NAME."""
    rows: dict[str, int]
    """The rows of each table that was written."""
    kept: list[str]
    """The tables that were there before and stay as they were."""
    read: int
    """The rows of the source."""
    left_out: dict[str, int]
    """How many of them are not in the data set, by the first reason."""
    left_out_file: Path | None
    """Each of these rows with all its reasons; None where every row was taken."""
    notes: list[str]
    """What a run will still need."""
    commands: list[str]
    """What commits the data set."""


def import_data(
    project: Project,
    format_name: str,
    source: str,
    to: str,
    options: HubOptions,
    *,
    merge: bool = False,
    strict: bool = False,
) -> Imported:
    """Make the data set `to` from a source in a public format, and have DVC pin it.

    A row of the source that can't be converted, or breaks a rule of validation, is left out and
    counted; the data set then keeps every rule that does not depend on an experiment. With `merge`
    an existing data set gets the tables that it does not have. The same source gives the same
    bytes.

    Raises:
        ParamsError: there is no such format.
        DataError: the source or the target is not fit, or a row would be left out and `strict` is
            on. Nothing was changed.
        MachineError: the files can't be written. Nothing was changed.
    """
    form = _format_named(format_name)
    path = _checked_path(to)
    target = project.root / path
    _refuse_edits(project.root, but_missing=True)
    pull_missing(project.root)
    _refuse_edits(project.root)
    _refuse_taken(target, path, merge=merge)
    records = read_source(source, options)
    selection = select(records, form)
    _refuse_misfits(selection, records, format_name, source, strict=strict)
    kept = [table for table in TABLES if find_table(target, table)]
    tables = {
        table: rows
        for table, rows in tables_of(form.table, selection.rows).items()
        if table not in kept
    }
    if not tables:
        raise DataError(
            f"{path} has every table that {format_name} gives already ({', '.join(kept)}), and "
            "they would stay as they are. Import to another data/NAME."
        )
    file = project.home / "imports" / f"{path.name}-left-out.jsonl"
    notes = _write(project.root, target, tables, file, selection.left_out)
    return Imported(
        path=path.as_posix(),
        rows={table: len(rows) for table, rows in tables.items()},
        kept=kept,
        read=len(records),
        left_out=count_reasons(selection.left_out),
        left_out_file=file if selection.left_out else None,
        notes=notes,
        commands=_commands(project.root, source, path),
    )


def report(imported: Imported) -> str:
    """What was imported, what was left out and why, and what to do next, as plain text."""
    reasons = list(imported.left_out.items())
    lines = [f"{imported.path}:"]
    lines += [f"  {table}: {count} rows" for table, count in imported.rows.items()]
    lines += [f"  {table}: there before, not changed" for table in imported.kept]
    lines.append(f"{sum(imported.left_out.values())} of {imported.read} rows left out")
    lines += [f"  {count} {reason}" for reason, count in reasons[:REASONS_SHOWN]]
    if len(reasons) > REASONS_SHOWN:
        lines.append(f"  … and {len(reasons) - REASONS_SHOWN} more reasons")
    if imported.left_out_file:
        lines.append(f"  Each with its reasons: {imported.left_out_file}")
    lines += [f"Note: {note}" for note in imported.notes]
    lines.append("data.dvc pins it now. To share and commit it:")
    lines += [f"  {command}" for command in imported.commands]
    lines.append("To train on it, say so in an experiment in params/:")
    lines.append(f"  data: {{path: {imported.path}}}")
    lines.append("and count its tokens against the limits: plumbline data check EXPERIMENT")
    return "\n".join(lines)


# What is refused before anything is written.


def _format_named(name: str) -> Format:
    if name not in FORMATS:
        near = get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ParamsError(f"{name}: no such format{hint} Formats: {', '.join(FORMATS)}.")
    return FORMATS[name]


def _checked_path(to: str) -> Path:
    path = Path(to)
    if path.is_absolute() or ".." in path.parts or path.parts[:1] != ("data",):
        raise DataError(f"--to: expected a folder below data/, which data.dvc tracks, got {to!r}.")
    if len(path.parts) != 2:
        raise DataError(f"--to: expected data/NAME, got {to!r}.")
    return path


def _refuse_edits(root: Path, *, but_missing: bool = False) -> None:
    """Edits that nobody added would be pinned together with the import."""
    edits = [
        line
        for line in status(root)["differences"]
        if not (but_missing and line.startswith("missing: "))
    ]
    if edits:
        listed = "".join(f"\n  {line}" for line in edits)
        raise DataError(
            f"data/ is not what data.dvc pins, and an import would pin this too:{listed}\n"
            "To keep these edits, run `dvc add data` and commit data.dvc. To drop them, run "
            "`dvc checkout --force data.dvc`. Then import again."
        )


def _refuse_taken(target: Path, path: Path, *, merge: bool) -> None:
    if target.exists() and not target.is_dir():
        raise DataError(f"--to: {path} is a file; expected a folder that is not there yet.")
    if not merge and target.is_dir() and any(target.iterdir()):
        raise DataError(
            f"--to: {path} is there already. Import to another name, add the tables that it lacks "
            f"with --merge, or remove it: `rm -r {shlex.quote(str(path))} && dvc add data`."
        )


def _refuse_misfits(
    selection: Selection,
    records: Sequence[Record],
    format_name: str,
    source: str,
    *,
    strict: bool,
) -> None:
    failures = [failure for row in selection.left_out for failure in row.failures]
    if not selection.rows:
        rows = [record.values for record in records if isinstance(record.values, dict)]
        columns = dict.fromkeys(str(column) for row in rows for column in row)
        guess = guess_format(rows)
        hint = f" It looks like {guess}: give that as the format." if guess else ""
        raise DataError(
            f"No row of {source} can be imported as {format_name}: expected the columns "
            f"{FORMATS[format_name].columns}; got {', '.join(columns) or 'none'}.{hint}\n"
            f"{format_report(failures, limit=5)}"
        )
    if strict and failures:
        raise DataError(
            f"--strict: {len(selection.left_out)} of {len(records)} rows would be left out. Mend "
            f"them, or import without --strict.\n{format_report(failures)}"
        )


# Written aside, validated, moved into place.


def _write(
    root: Path,
    target: Path,
    tables: Mapping[str, Sequence[Row]],
    left_out_file: Path,
    left_out: Sequence[LeftOut],
) -> list[str]:
    """Write the tables and have DVC pin them, all or nothing; returns what a run still needs."""
    try:
        with _folder_aside(root) as aside:
            new = aside / "new"
            if target.exists():
                shutil.copytree(target, new)
            new.mkdir(exist_ok=True)
            for table, rows in tables.items():
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (new / f"{table}.jsonl").write_bytes("".join(lines).encode())
            notes = _check(new, target.name)
            write_left_out(left_out_file, left_out)
            _refuse_edits(root)
            with _in_place(new, target, aside / "old", root / "data.dvc"):
                add_data(root)
    except OSError as error:
        raise MachineError(
            f"Can't write {target}: {error}. Make room there or give write permission; data/ is "
            "as it was."
        ) from error
    return notes


def _check(folder: Path, name: str) -> list[str]:
    """Validate a data set; returns what only a run needs.

    Raises:
        InvalidData: a row breaks a rule.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tables, failures = read_dataset(folder, TEST_FRACTION, Path(scratch))
        missing = sorted(set(TABLES) - OPTIONAL_TABLES - set(tables))
        uneven = empty_splits(tables)
        failures = sorted({*failures, *validate(tables)} - set(uneven))
    # A missing table is reported under its name, every other fault under that of a file.
    if faults := [failure for failure in failures if failure.file not in missing]:
        raise InvalidData(faults)
    return [
        *(
            f"{table} are still missing, and a run may need them. Import them from another source "
            f"with --to data/{name} --merge, or write data/{name}/{table}.jsonl yourself."
            for table in missing
        ),
        *(f"{failure.reason} (now {TEST_FRACTION})" for failure in uneven),
    ]


@contextmanager
def _folder_aside(root: Path) -> Iterator[Path]:
    """A folder on the file system of data/ that neither git nor DVC looks at."""
    scratch = root / ".dvc" / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="import-", dir=scratch) as aside:
        yield Path(aside)


@contextmanager
def _in_place(new: Path, target: Path, old: Path, pin: Path) -> Iterator[None]:
    """`new` as `target`; on any error target and pin are what they were."""
    pinned = pin.read_bytes()
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
        yield
    except BaseException:
        if not new.exists():
            os.replace(target, new)
        if old.exists():
            os.replace(old, target)
        if pin.read_bytes() != pinned:
            pin.write_bytes(pinned)
        raise


def _commands(root: Path, source: str, path: Path) -> list[str]:
    name = Path(source).name if Path(source).expanduser().exists() else source
    store = store_in_project(root)
    files = "data.dvc" if store is None else f"data.dvc {shlex.quote(store)}"
    message = shlex.quote(f"Import {name} as {path.as_posix()}")
    # The push goes first: a store inside the project is committed with what it pushed.
    return ["dvc push", f"git add {files}", f"git commit -m {message}"]
