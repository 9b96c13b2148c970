"""The one report on a data set: everything that is wrong in it, by file, row, field and reason."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from pandera.pandas import DataFrameSchema

from plumbline.data.findings import find, with_findings
from plumbline.data.formats import (
    OPTIONAL_TABLES,
    SUFFIXES,
    TABLES,
    Failure,
    canonical_frame,
    find_table,
    read_batches,
)
from plumbline.data.schemas import CONTROL_CHARACTERS, RESPONSES, broken_rules, schema_of
from plumbline.data.splits import with_prompt_ids
from plumbline.data.tables import StoredRows, Table, store_rows, tables_of
from plumbline.data.values import Fault, conversation, excerpt
from plumbline.errors import DataError
from plumbline.second_process import map_in_two_processes

REPORT_LIMIT = 20
_CONTROL = re.compile(CONTROL_CHARACTERS)


@dataclass(frozen=True)
class Limits:
    """The longest prompt and response that the model is given, in tokens."""

    max_prompt_tokens: int
    max_response_tokens: int


class TokenCounter(Protocol):
    """Counts tokens as training will see them: chat template and end token included."""

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, given as the canonical JSON of its messages.

        Raises:
            DataError: a prompt can't be brought into the form that training needs.
        """

    def response_lengths(self, responses: Sequence[str]) -> list[int]:
        """Tokens of each response, given as text."""


class InvalidData(DataError):
    """The data breaks rules; `failures` has every one of them, the message the first few."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        self.failures = list(failures)
        super().__init__(f"{format_report(self.failures)}\n{_what_to_do(self.failures)}")


def read_dataset(
    folder: Path, test_fraction: float, scratch: Path
) -> tuple[dict[str, Table], list[Failure]]:
    """Read all tables of a data set, each row with its `prompt_id` and its split.

    The texts wait in files in `scratch`, which must stay as long as the tables. A split that a file
    states counts for that prompt in all files; all other prompts are split by hash
    (`findings.index_of`). A row whose prompt could not be read has neither id nor split.
    All faults are in the failures, which `validate` does not repeat.

    Raises:
        DataError: there is no such folder.
        MachineError: the files can't be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"There is no data set at {folder}; expected a folder with "
            f"{', '.join(sorted(set(TABLES) - OPTIONAL_TABLES))}. "
            "Set data.path to one, or pull the data."
        )
    stored: list[StoredRows] = []
    failures: list[Failure] = []
    for table in TABLES:
        try:
            path = find_table(folder, table)
        except DataError as error:
            failures.append(Failure(table, None, None, str(error)))
            continue
        if path is not None:
            rows, found = _read(path, table, scratch)
            stored.append(rows)
            failures.extend(found)
        elif table not in OPTIONAL_TABLES:
            expected = " or ".join(table + suffix for suffix in SUFFIXES)
            failures.append(Failure(table, None, None, f"missing file, expected {expected}"))
    tables = tables_of(stored, test_fraction)
    # Where no row could be read the reason stands already, and "no rows" would only hide it.
    readable = {name: table for name, table in tables.items() if table.index["split"].notna().any()}
    return tables, sorted({*failures, *empty_splits(readable)})


def validate(
    tables: Mapping[str, Table],
    limits: Limits | None = None,
    counter: TokenCounter | None = None,
) -> list[Failure]:
    """Every rule that the rows of `read_dataset` break, sorted; lengths only if both are given."""
    if (limits is None) != (counter is None):
        raise TypeError("expected both limits and counter, or neither")
    findings = find({name: table.index for name, table in tables.items()})
    look = _Look(tables, findings, limits, counter)
    batches = [(name, i) for name, table in tables.items() for i in range(table.batch_count())]
    return sorted(set[Failure]().union(*map_in_two_processes(look, batches)))


def prompt_lengths(
    prompts: Sequence[str], counter: TokenCounter
) -> tuple[dict[str, int], dict[str, str]]:
    """Tokens of each prompt that the counter takes, and the reason for each that it refuses."""
    try:
        return dict(zip(prompts, counter.prompt_lengths(prompts), strict=True)), {}
    except DataError:
        pass
    lengths, refused = {}, {}
    for prompt in prompts:
        try:
            [lengths[prompt]] = counter.prompt_lengths([prompt])
        except DataError as error:
            refused[prompt] = str(error)
    return lengths, refused


def empty_splits(tables: Mapping[str, Table]) -> list[Failure]:
    """A failure for each required table that has no row in train, or none in test."""
    return [
        Failure(
            table.stored.file,
            None,
            None,
            f"{name} has no {split} rows; add rows, or change data.test_fraction",
        )
        for name, table in tables.items()
        if name not in OPTIONAL_TABLES
        for split in ("train", "test")
        if not (table.index["split"] == split).any()
    ]


def failures_table(failures: Iterable[Failure]) -> list[dict[str, Any]]:
    """The failures as rows of a table: file, row, field, reason, value."""
    return [asdict(failure) for failure in failures]


def format_report(failures: Sequence[Failure], limit: int = REPORT_LIMIT) -> str:
    """The failures as plain text: how many and where, then the first `limit`, one a line."""
    if not failures:
        return "no failures"
    ordered = sorted(failures)
    by_file = Counter(failure.file for failure in ordered)
    where = ", ".join(f"{file} {count}" for file, count in by_file.items())
    lines = [f"{_plural(len(ordered), 'failure')} in {_plural(len(by_file), 'file')}: {where}"]
    lines += [_line(failure) for failure in ordered[:limit]]
    if len(ordered) > limit:
        lines.append(f"… and {len(ordered) - limit} more")
    return "\n".join(lines)


def _line(failure: Failure) -> str:
    row = "" if failure.row is None else f":{failure.row}"
    field = "" if failure.field is None else f" {failure.field}"
    value = f" [{failure.value}]" if failure.value.strip() else ""
    return f"{failure.file}{row}{field}: {failure.reason}{value}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _what_to_do(failures: Sequence[Failure]) -> str:
    if any(failure.row is None for failure in failures):
        return (
            "Mend the files. A fault of a whole file or table cannot be set aside: "
            "data.on_invalid=quarantine only helps with rows."
        )
    return "Mend these rows, or set data.on_invalid=quarantine to go on without them."


@dataclass(frozen=True)
class _Look:
    """Finds the failures of one batch."""

    tables: Mapping[str, Table]
    findings: Mapping[str, pd.DataFrame]
    limits: Limits | None
    counter: TokenCounter | None

    def __call__(self, batch: tuple[str, int]) -> set[Failure]:
        """The rules that the rows of a table's batch break, given its name and its number."""
        name, number = batch
        table, limits = self.tables[name], self.limits
        frame = with_findings(table.batch(number), self.findings[name])
        failures: set[Failure] = set()
        if self.counter is not None:
            frame, refused = _with_lengths(frame, self.counter)
            failures |= _refusals(frame, refused, table.stored.file)
        sizes = (limits.max_prompt_tokens, limits.max_response_tokens) if limits else (None, None)
        return failures | _broken_rules(frame, schema_of(name, *sizes), table.stored.file)


def _read(path: Path, table: str, scratch: Path) -> tuple[StoredRows, list[Failure]]:
    failures: list[Failure] = []

    def frames() -> Iterator[pd.DataFrame]:
        for frame, found in read_batches(path, table):
            failures.extend(found)
            yield with_prompt_ids(frame)

    try:
        return store_rows(table, path.name, frames(), scratch), failures
    except Fault as fault:
        nothing = with_prompt_ids(canonical_frame([], table, set()))
        return store_rows(table, path.name, [nothing], scratch), [
            Failure(path.name, None, None, str(fault))
        ]


def _with_lengths(
    frame: pd.DataFrame, counter: TokenCounter
) -> tuple[pd.DataFrame, dict[str, str]]:
    """A column `<field>_tokens` for each text field, and the reason for each refused prompt.

    Each distinct text is counted once.
    """
    texts = {field: frame[field].tolist() for field in ("prompt", *RESPONSES) if field in frame}
    distinct = {
        field: [text for text in dict.fromkeys(column) if isinstance(text, str)]
        for field, column in texts.items()
    }
    lengths, refused = prompt_lengths(distinct.pop("prompt"), counter)
    counted = {"prompt": lengths}
    for field, responses in distinct.items():
        counted[field] = dict(zip(responses, counter.response_lengths(responses), strict=True))
    tokens = {
        f"{field}_tokens": pd.array([counted[field].get(text) for text in column], dtype="Int64")
        for field, column in texts.items()
    }
    return frame.assign(**tokens), refused


def _refusals(frame: pd.DataFrame, refused: Mapping[str, str], file: str) -> set[Failure]:
    return {
        Failure(file, row, "prompt", refused[prompt], _shown(prompt, "prompt", refused[prompt]))
        for row, prompt in zip(frame["row"].tolist(), frame["prompt"], strict=True)
        if refused and prompt in refused
    }


def _broken_rules(frame: pd.DataFrame, schema: DataFrameSchema, file: str) -> set[Failure]:
    broken = broken_rules(frame, schema)
    rows = frame.loc[broken["index"]]
    values = {field: rows[field].tolist() for field in broken["field"].unique()}
    return {
        Failure(file, row, field, reason, _shown(values[field][i], field, reason))
        for i, (row, field, reason) in enumerate(
            zip(rows["row"].tolist(), broken["field"], broken["reason"], strict=True)
        )
    }


def _shown(value: Any, field: str, reason: str) -> str:
    if not isinstance(value, str):
        return "" if pd.isna(value) else str(value)
    if field == "prompt":
        value = "\n".join(turn["content"] for turn in conversation(value))
    control = _CONTROL.search(value) if reason == "control character" else None
    return excerpt(value, control.start() if control else 0)
