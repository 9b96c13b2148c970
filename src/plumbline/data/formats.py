"""The readers: jsonl, parquet or csv in, canonical rows and a list of failures out."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
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


def read_table(path: Path, table: str) -> tuple[pd.DataFrame, list[Failure]]:
    """Read one file into canonical rows, in file order, and say everything that is wrong in it.

    The frame has `row` (1-based: the line of a jsonl file, blank lines counted; the data row of a
    csv or parquet file), the table's fields, `split` where the file states one (else null) and
    `file` (the file's name). `prompt` is the compact JSON of the messages, responses are plain
    text. A field that could not be read is null and has a failure; a row that could not be read at
    all is left out and has one too. A margin that is not given is 0, a `clean` that is not given is
    True. Nothing is raised for what the file holds.
    """
    failures: list[Failure] = []
    known = {*TABLES[table], *OPTIONAL_COLUMNS.get(table, ()), "split"}
    if table == "demonstrations":
        known.add("messages")
    try:
        if path.suffix == ".parquet":
            columns, records = _read_parquet(path, known, failures)
        else:
            content = path.read_bytes()
            if not content.strip():
                raise Fault("empty file")
            read = _read_csv if path.suffix == ".csv" else _read_jsonl
            columns, records = read(content, path.name, failures)
    except FileNotFoundError:
        return _frame([], table, set(), path.name), [Failure(path.name, None, None, "missing file")]
    except OSError as error:
        reason = f"unreadable file: {error.strerror or error}"
        return _frame([], table, set(), path.name), [Failure(path.name, None, None, reason)]
    except Fault as fault:
        failures.append(Failure(path.name, None, None, str(fault)))
        return _frame([], table, set(), path.name), failures

    if not records and not failures:
        failures.append(Failure(path.name, None, None, "empty file"))
    if records:
        covered = columns | ({"prompt", "response"} if "messages" in columns & known else set())
        failures.extend(
            Failure(path.name, None, field, "missing column")
            for field in TABLES[table]
            if field not in covered
        )
    rows = [_canonical_row(record, table, columns, path.name, failures) for record in records]
    return _frame(rows, table, columns, path.name), failures


# The three formats: each gives the column names and (row, values) records.


def _read_jsonl(
    content: bytes, file: str, failures: list[Failure]
) -> tuple[set[str], list[Record]]:
    columns: set[str] = set()
    records: list[Record] = []
    offset = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    # Only b"\n" ends a line: str.splitlines would also cut at U+2028 inside a string.
    for row, line in enumerate(content[offset:].split(b"\n"), start=1):
        try:
            text = line.decode()
            if text.strip():
                value = json.loads(text)
                if isinstance(value, dict):
                    columns.update(value)
                    records.append((row, value))
                else:
                    failures.append(Failure(file, row, None, "row is not an object", excerpt(text)))
        except UnicodeDecodeError as error:
            failures.append(_not_utf8(file, row, offset + error.start))
        except json.JSONDecodeError as error:
            reason = f"malformed JSON ({error.msg} at character {error.pos + 1})"
            failures.append(Failure(file, row, None, reason, excerpt(text, error.pos)))
        except (ValueError, RecursionError) as error:
            failures.append(Failure(file, row, None, f"malformed JSON ({error})", excerpt(text)))
        offset += len(line) + 1
    return columns, records


def _read_csv(content: bytes, file: str, failures: list[Failure]) -> tuple[set[str], list[Record]]:
    # A byte that is not UTF-8 becomes one lone surrogate, which valid UTF-8 never holds: so the
    # rows can be told apart first, and each bad byte is then counted off to the row that has it.
    text = content.decode("utf-8", errors="surrogateescape")
    bad_offsets = _escaped_offsets(text)
    lines = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    header: list[str] | None = None
    records: list[Record] = []
    row = 0
    try:
        for cells in lines:
            if not cells:
                continue
            bad = [next(bad_offsets) for _ in range(sum(map(_count_escaped, cells)))]
            if header is None:
                header = [name.strip() for name in cells]
                if bad:
                    raise Fault(f"not UTF-8 (byte {bad[0]}, in the header)")
                if len(set(header)) != len(header):
                    raise Fault("a column appears more than once in the header")
                continue
            row += 1
            if bad:
                failures.append(_not_utf8(file, row, bad[0]))
            elif len(cells) != len(header):
                reason = f"expected {len(header)} cells, got {len(cells)}"
                failures.append(Failure(file, row, None, reason, excerpt(",".join(cells))))
            else:
                records.append((row, dict(zip(header, map(Cell, cells), strict=True))))
    except csv.Error as error:
        # The reader cannot find its way back into the file, so the rows below are not looked at.
        failures.append(Failure(file, row + 1, None, f"malformed csv ({error})"))
    return set(header or ()), records


def _read_parquet(
    path: Path, known: set[str], failures: list[Failure]
) -> tuple[set[str], list[Record]]:
    if path.stat().st_size == 0:
        raise Fault("empty file")
    try:
        with pq.ParquetFile(path) as file:
            columns = set(file.schema_arrow.names)
            table = file.read(columns=sorted(columns & known))
            rows = file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise Fault(f"unreadable parquet: {error}") from error
    if len(set(table.column_names)) != len(table.column_names):
        raise Fault("unreadable parquet: a column appears more than once")
    values: dict[str, list[Any]] = {}
    for name in table.column_names:
        try:
            values[name] = table.column(name).to_pylist()
        except UnicodeDecodeError:
            values[name] = [_parquet_value(scalar) for scalar in table.column(name)]
    # A bad byte spoils its row as in the other formats: there is no telling what was meant.
    broken: dict[int, _NotUtf8] = {}
    for column in values.values():
        for index, value in enumerate(column):
            if isinstance(value, _NotUtf8):
                broken.setdefault(index, value)
    failures.extend(_not_utf8(path.name, i + 1, bad.offset) for i, bad in broken.items())
    return columns, [
        (index + 1, {name: column[index] for name, column in values.items()})
        for index in range(rows)
        if index not in broken
    ]


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


def _count_escaped(cell: str) -> int:
    return 0 if cell.isascii() else len(_ESCAPED.findall(cell))


def _escaped_offsets(text: str) -> Iterator[int]:
    """The byte offset of each byte that was not UTF-8."""
    position = offset = 0
    for match in _ESCAPED.finditer(text):
        offset += len(text[position : match.start()].encode("utf-8", errors="surrogateescape"))
        position = match.start()
        yield offset


def _canonical_row(
    record: Record, table: str, columns: set[str], file: str, failures: list[Failure]
) -> tuple[Any, ...]:
    row, values = record
    if _is_conversation(values, columns) and table == "demonstrations":
        values = _split_messages(row, values, file, failures)
        columns = columns | {"prompt", "response"}
    result: list[Any] = [row]
    for field in _fields(table, columns):
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


def _is_conversation(values: dict[str, Any], columns: set[str]) -> bool:
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


def _fields(table: str, columns: set[str]) -> tuple[str, ...]:
    optional = (name for name in OPTIONAL_COLUMNS.get(table, ()) if name in columns)
    return (*TABLES[table], *optional, "split")


def _frame(rows: list[tuple[Any, ...]], table: str, columns: set[str], file: str) -> pd.DataFrame:
    fields = _fields(table, columns)
    series = {"row": pd.Series([row[0] for row in rows], dtype="int64")}
    for position, field in enumerate(fields, start=1):
        series[field] = pd.Series([row[position] for row in rows], dtype=DTYPES.get(field, "str"))
    series["file"] = pd.Series(pd.Categorical([file] * len(rows), categories=[file]))
    return pd.DataFrame(series)
