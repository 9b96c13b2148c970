"""Which rows of a source fit our tables and rules, and what is wrong with the others."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plumbline.data.convert import Format, Row
from plumbline.data.formats import Failure
from plumbline.data.sources import Record
from plumbline.data.validation import read_dataset, validate
from plumbline.data.values import Fault
from plumbline.params.schema import DataParams

TEST_FRACTION: float = DataParams.model_fields["test_fraction"].default
"""An experiment chooses its own; a data set is looked at with the default."""


class LeftOut(NamedTuple):
    """A row that is left out."""

    record: Record
    reason: str
    """The first reason, without what is the row's own, so that rows can be counted by it."""
    failures: list[Failure]


class Selection(NamedTuple):
    """The rows of a source, sorted out; both parts in the order of the source."""

    rows: list[Row]
    left_out: list[LeftOut]


def select(records: Sequence[Record], form: Format) -> Selection:
    """Convert every record, and leave out what can't be converted or breaks a rule of validation.

    The rules are those that need no other table and no tokenizer: blank text, control characters,
    invalid Unicode, duplicates, equal and reversed pairs, margins.
    """
    rows: dict[int, Row] = {}
    left_out: dict[int, LeftOut] = {}
    for number, record in enumerate(records, start=1):
        try:
            if isinstance(record.values, Fault):
                raise record.values
            rows[number] = form.convert(record.values)
        except Fault as fault:
            failure = Failure(record.file, record.row, None, str(fault))
            left_out[number] = LeftOut(record, str(fault), [failure])
    for number, failures in _broken_rules(rows, form.table, len(records)).items():
        del rows[number]
        left_out[number] = LeftOut(
            record=records[number - 1],
            reason=_OTHER_ROW.sub("another row", f"{failures[0].field}: {failures[0].reason}"),
            failures=[_as_of_source(failure, records) for failure in failures],
        )
    return Selection(list(rows.values()), [left_out[number] for number in sorted(left_out)])


def count_reasons(left_out: Iterable[LeftOut]) -> dict[str, int]:
    """How many rows are left out for which first reason, the most frequent first."""
    return dict(Counter(row.reason for row in left_out).most_common())


def write_left_out(path: Path, left_out: Sequence[LeftOut]) -> None:
    """One line a row: its file and number, all reasons, and the row as the source has it.

    An older file is replaced, and removed where no row is left out.
    """
    if not left_out:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps(_as_json(row), ensure_ascii=False, default=str) + "\n" for row in left_out]
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lone surrogate becomes \udc.., which is how JSON writes it.
    path.write_bytes("".join(lines).encode(errors="backslashreplace"))


def _as_json(row: LeftOut) -> dict[str, Any]:
    values = row.record.values
    return {
        "file": row.record.file,
        "row": row.record.row,
        "reasons": [
            failure.reason if failure.field is None else f"{failure.field}: {failure.reason}"
            for failure in row.failures
        ],
        "record": None if isinstance(values, Fault) else values,
    }


def _broken_rules(rows: Mapping[int, Row], table: str, count: int) -> dict[int, list[Failure]]:
    """The rules of validation that converted rows break, by the number of their record."""
    with tempfile.TemporaryDirectory() as folder:
        # A row's line is its record's number: a blank line stands for what was not converted.
        lines = [json.dumps(rows[n]) if n in rows else "" for n in range(1, count + 1)]
        Path(folder, f"{table}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        tables, failures = read_dataset(Path(folder), TEST_FRACTION, Path(folder))
        failures = sorted({*failures, *validate(tables)})
    found: dict[int, list[Failure]] = {}
    for failure in failures:
        if failure.row is not None:
            found.setdefault(failure.row, []).append(failure)
    return found


_OTHER_ROW = re.compile(r"\brow \d+")


def _as_of_source(failure: Failure, records: Sequence[Record]) -> Failure:
    """The failure with places in the source where it has numbers of records."""

    def place(match: re.Match[str]) -> str:
        other = records[int(match[0].removeprefix("row ")) - 1]
        return f"{other.file}:{other.row}"

    record = records[(failure.row or 1) - 1]
    reason = _OTHER_ROW.sub(place, failure.reason)
    return Failure(record.file, record.row, failure.field, reason, failure.value)
