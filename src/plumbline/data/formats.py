"""The readers: jsonl, parquet or csv in, batches of canonical rows and of failures out."""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import total_ordering
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from plumbline.data.values import CONVERTERS, Cell, Fault, decoded, excerpt, turns_of
from plumbline.errors import DataError

TABLES: dict[str, tuple[str, ...]] = {
    "demonstrations": ("prompt", "response"),
    "preferences": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
    "ratings": ("prompt", "response", "label"),
}
"""Every table of a data set and its required columns."""

OPTIONAL_TABLES = frozenset({"ratings"})
OPTIONAL_COLUMNS: dict[str, tuple[str, ...]] = {"preferences": ("margin", "clean")}
SUFFIXES = (".jsonl", ".parquet", ".csv")
DTYPES = {"margin": "float64", "clean": "boolean", "label": "boolean"}
"""Column types in the canonical frame; every other field is text (`str`)."""

BATCH_ROWS = 2**14
"""How many rows are read and looked at together."""

Record = tuple[int, dict[str, Any]]


@total_ordering
@dataclass(frozen=True)
class Failure:
    """One broken rule; `row` and `field` are None where the fault is the whole file's or row's."""

    file: str
    row: int | None
    field: str | None
    reason: str
    value: str = ""

    def __lt__(self, other: "Failure") -> bool:
        return self._sort_key() < other._sort_key()

    def _sort_key(self) -> tuple[str, int, str, str, str]:
        return (self.file, self.row or 0, self.field or "", self.reason, self.value)


def find_table(folder: Path, table: str) -> Path | None:
    """The file of a table, or None where there is none; `DataError` where there are several."""
    found = [path for path in (folder / f"{table}{s}" for s in SUFFIXES) if path.is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(
            f"{folder} holds {names} for the one table {table!r}; expected one file. "
            "Keep the one that is meant and remove the others."
        )
    return found[0] if found else None


def read_batches(path: Path, table: str) -> Iterator[tuple[pd.DataFrame, list[Failure]]]:
    """Read one file in batches of canonical rows, in file order, and say what is wrong in each.

    A frame has `row` (1-based: the line of a jsonl file, blank lines counted; the data row of a
    csv or parquet file), the table's fields and `split` where the file states one (else null).
    `prompt` is the compact JSON of the messages, responses are plain text. A field that could not
    be read is null and has a failure; a row that could not be read at all is left out and has one
    too. A margin that is not given is 0, a `clean` that is not given is True.

    Raises:
        Fault: the file as a whole can't be read, or holds no rows; of no batch before it then
            counts anything.
    """
    try:
        yield from _read_batches(path, table)
    except FileNotFoundError as error:
        raise Fault("missing file") from error
    except OSError as error:
        raise Fault(f"unreadable file: {error.strerror or error}") from error


def canonical_frame(
    rows: Sequence[tuple[Any, ...]], table: str, columns: AbstractSet[str]
) -> pd.DataFrame:
    """The frame of canonical rows (`row`, then the fields) of a file that has these columns."""
    series = {"row": pd.Series([row[0] for row in rows], dtype="int64")}
    for position, field in enumerate(_fields(table, columns), start=1):
        series[field] = pd.Series([row[position] for row in rows], dtype=DTYPES.get(field, "str"))
    return pd.DataFrame(series)


def _read_batches(path: Path, table: str) -> Iterator[tuple[pd.DataFrame, list[Failure]]]:
    known = {*TABLES[table], *OPTIONAL_COLUMNS.get(table, ()), "split"}
    if table == "demonstrations":
        known.add("messages")
    if _is_blank(path):
        raise Fault("empty file")
    columns = _COLUMNS[path.suffix](path, known)
    fields = _fields(table, columns)
    rows: list[tuple[Any, ...]] = []
    failures: list[Failure] = []
    records = faults = 0
    for item in _RECORDS[path.suffix](path, known & columns):
        if isinstance(item, Failure):
            failures.append(item)
            faults += 1
            continue
        rows.append(_canonical_row(item, table, fields, columns, path.name, failures))
        records += 1
        if len(rows) == BATCH_ROWS:
            yield canonical_frame(rows, table, columns), failures
            rows, failures = [], []
    if not records and not faults:
        raise Fault("empty file")
    if records:
        covered = columns | ({"prompt", "response"} if "messages" in columns else set())
        failures.extend(
            Failure(path.name, None, field, "missing column")
            for field in TABLES[table]
            if field not in covered
        )
    yield canonical_frame(rows, table, columns), failures


def _is_blank(path: Path) -> bool:
    with path.open("rb") as file:
        return not any(block.strip() for block in iter(lambda: file.read(1 << 16), b""))


# Each of the three formats: the known columns that the file has, and its rows one by one.


def _jsonl_columns(path: Path, known: AbstractSet[str]) -> set[str]:
    found: set[str] = set()
    missing = [f'"{name}"'.encode() for name in known]
    for _, _, line in _jsonl_lines(path):
        # A new key has to be spelled in its line, plainly or by escapes: few need to be parsed.
        if b"\\u" in line or any(name in line for name in missing):
            with suppress(ValueError, RecursionError):
                if isinstance(value := json.loads(line.decode()), dict):
                    found |= value.keys() & known
                    missing = [f'"{name}"'.encode() for name in known - found]
        if not missing:
            break
    return found


def _jsonl_records(path: Path, columns: AbstractSet[str]) -> Iterator[Record | Failure]:
    for row, offset, line in _jsonl_lines(path):
        try:
            text = line.decode()
            if text.strip():
                value = json.loads(text)
                if isinstance(value, dict):
                    yield row, value
                else:
                    yield Failure(path.name, row, None, "row is not an object", excerpt(text))
        except UnicodeDecodeError as error:
            yield _not_utf8(path.name, row, offset + error.start)
        except json.JSONDecodeError as error:
            reason = f"malformed JSON ({error.msg} at character {error.pos + 1})"
            yield Failure(path.name, row, None, reason, excerpt(text, error.pos))
        except (ValueError, RecursionError) as error:
            yield Failure(path.name, row, None, f"malformed JSON ({error})", excerpt(text))


def _jsonl_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset in bytes and content of each line."""
    with path.open("rb") as file:
        offset = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(offset)
        # Only b"\n" ends a line: str.splitlines would also cut at U+2028 inside a string.
        for row, line in enumerate(file, start=1):
            yield row, offset, line.removesuffix(b"\n")
            offset += len(line)


def _csv_columns(path: Path, known: AbstractSet[str]) -> set[str]:
    # A header that is no csv is a failure of row 1, which the records have.
    with suppress(csv.Error):
        for cells, bad in _csv_rows(path):
            header = _header(cells)
            if bad:
                raise Fault(f"not UTF-8 (byte {bad[0]}, in the header)")
            if len(set(header)) != len(header):
                raise Fault("a column appears more than once in the header")
            return {*header} & known
    return set()


def _csv_records(path: Path, columns: AbstractSet[str]) -> Iterator[Record | Failure]:
    header: list[str] | None = None
    row = 0
    try:
        for cells, bad in _csv_rows(path):
            if header is None:
                header = _header(cells)
                continue
            row += 1
            if bad:
                yield _not_utf8(path.name, row, bad[0])
            elif len(cells) != len(header):
                reason = f"expected {len(header)} cells, got {len(cells)}"
                yield Failure(path.name, row, None, reason, excerpt(",".join(cells)))
            else:
                yield row, dict(zip(header, map(Cell, cells), strict=True))
    except csv.Error as error:
        # The reader cannot find its way back into the file, so the rows below are not looked at.
        yield Failure(path.name, row + 1, None, f"malformed csv ({error})")


def _csv_rows(path: Path) -> Iterator[tuple[list[str], list[int]]]:
    """The cells of each row that has any, and the offset of each of its bytes that is not UTF-8."""
    bad: list[int] = []

    def lines() -> Iterator[str]:
        offset = 0
        # A byte that is not UTF-8 becomes one lone surrogate, which valid UTF-8 never holds.
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            for number, line in enumerate(file):
                if line.isascii():
                    yield line
                    offset += len(line)
                    continue
                bad.extend(
                    offset + len(line[: match.start()].encode(errors="surrogateescape"))
                    for match in _ESCAPED.finditer(line)
                )
                yield line if number else line.removeprefix("\ufeff")
                offset += len(line.encode(errors="surrogateescape"))

    # A row is made of whole lines, so that the bad bytes read since the last row are its own.
    for cells in csv.reader(lines(), strict=True):
        if cells:
            yield cells, bad.copy()
        bad.clear()


def _header(cells: Sequence[str]) -> list[str]:
    return [name.strip() for name in cells]


def _parquet_columns(path: Path, known: AbstractSet[str]) -> set[str]:
    with _parquet_file(path) as file:
        names = [name for name in file.schema_arrow.names if name in known]
    if len(set(names)) != len(names):
        raise Fault("unreadable parquet: a column appears more than once")
    return set(names)


def _parquet_records(path: Path, columns: AbstractSet[str]) -> Iterator[Record | Failure]:
    row = 0
    with _parquet_file(path) as file:
        if not columns:
            yield from ((row, {}) for row in range(1, file.metadata.num_rows + 1))
            return
        for batch in file.iter_batches(BATCH_ROWS, columns=sorted(columns)):
            yield from _batch_records(batch, row, path.name)
            row += batch.num_rows


@contextmanager
def _parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError | FileNotFoundError):
            raise
        raise Fault(f"unreadable parquet: {error}") from error


def _batch_records(batch: pa.RecordBatch, before: int, file: str) -> Iterator[Record | Failure]:
    """The rows of a batch that comes after `before` others."""
    names = batch.schema.names
    values: list[list[Any]] = []
    for column in batch.columns:
        try:
            values.append(column.to_pylist())
        except UnicodeDecodeError:
            values.append([_parquet_value(scalar) for scalar in column])
    for row, cells in enumerate(zip(*values, strict=True), start=before + 1):
        # A bad byte spoils its row as in the other formats: there is no telling what was meant.
        bad = next((cell for cell in cells if isinstance(cell, _NotUtf8)), None)
        yield (
            _not_utf8(file, row, bad.offset) if bad else (row, dict(zip(names, cells, strict=True)))
        )


_COLUMNS: dict[str, Callable[[Path, AbstractSet[str]], set[str]]] = {
    ".jsonl": _jsonl_columns,
    ".parquet": _parquet_columns,
    ".csv": _csv_columns,
}
_RECORDS: dict[str, Callable[[Path, AbstractSet[str]], Iterator[Record | Failure]]] = {
    ".jsonl": _jsonl_records,
    ".parquet": _parquet_records,
    ".csv": _csv_records,
}


@dataclass(frozen=True)
class _NotUtf8:
    offset: int


def _parquet_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return _NotUtf8(error.start)


def _not_utf8(file: str, row: int, offset: int) -> Failure:
    return Failure(file, row, None, f"not UTF-8 (byte {offset})")


_ESCAPED = re.compile("[\udc80-\udcff]")


def _canonical_row(
    record: Record,
    table: str,
    fields: Sequence[str],
    columns: AbstractSet[str],
    file: str,
    failures: list[Failure],
) -> tuple[Any, ...]:
    row, values = record
    if table == "demonstrations" and _is_conversation(values, columns):
        values = _split_messages(row, values, file, failures)
        columns = columns | {"prompt", "response"}
    result: list[Any] = [row]
    for field in fields:
        value = None
        if field in columns:
            raw = values.get(field)
            try:
                value = CONVERTERS[field](raw)
            except Fault as fault:
                # The one message column has been reported under its own name.
                if raw is not _REPORTED:
                    failures.append(Failure(file, row, field, str(fault), excerpt(raw)))
        result.append(value)
    return tuple(result)


_REPORTED = object()


def _is_conversation(values: dict[str, Any], columns: AbstractSet[str]) -> bool:
    if values.get("response") is not None or "messages" not in columns:
        return False
    return values.get("messages") is not None or "response" not in columns


def _split_messages(
    row: int, values: dict[str, Any], file: str, failures: list[Failure]
) -> dict[str, Any]:
    """Give a whole conversation the columns `prompt` and `response`."""
    raw = values.get("messages")
    try:
        turns = turns_of(decoded(raw))
        if turns[-1]["role"] != "assistant":
            raise Fault("last turn is not the assistant's")
        if len(turns) < 2 or turns[-2]["role"] != "user":
            raise Fault("no user turn right before the assistant's last turn")
    except Fault as fault:
        failures.append(Failure(file, row, "messages", str(fault), excerpt(raw)))
        return {**values, "prompt": _REPORTED, "response": _REPORTED}
    return {**values, "prompt": turns[:-1], "response": turns[-1:]}


def _fields(table: str, columns: AbstractSet[str]) -> tuple[str, ...]:
    optional = (name for name in OPTIONAL_COLUMNS.get(table, ()) if name in columns)
    return (*TABLES[table], *optional, "split")
