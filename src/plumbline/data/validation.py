"""The one report on a data set: everything that is wrong in it, by file, row, field and reason."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from plumbline.data.formats import (
    OPTIONAL_TABLES,
    SUFFIXES,
    TABLES,
    Failure,
    find_table,
    read_table,
)
from plumbline.data.schemas import (
    CONTROL_CHARACTERS,
    RESPONSES,
    broken_rules,
    schema_of,
    with_findings,
)
from plumbline.data.splits import prompt_id, split_of
from plumbline.data.values import conversation, excerpt
from plumbline.errors import DataError

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
    folder: Path, test_fraction: float
) -> tuple[dict[str, pd.DataFrame], list[Failure]]:
    """Read all tables of a data set, with `prompt_id` and `split` filled in for every row.

    A split that a file states counts for that prompt in all files, so that no prompt is in train
    here and in test there; all other prompts are split by hash (`splits.split_of`). A row whose
    prompt could not be read has neither. Raises `DataError` where the folder does not exist; all
    other faults are in the failures, which `validate` does not repeat.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"There is no data set at {folder}; expected a folder with "
            f"{', '.join(sorted(set(TABLES) - OPTIONAL_TABLES))}. "
            "Set data.path to one, or pull the data."
        )
    tables: dict[str, pd.DataFrame] = {}
    failures: list[Failure] = []
    for table in TABLES:
        try:
            path = find_table(folder, table)
        except DataError as error:
            failures.append(Failure(table, None, None, str(error)))
            continue
        if path is not None:
            tables[table], found = read_table(path, table)
            failures.extend(found)
        elif table not in OPTIONAL_TABLES:
            expected = " or ".join(table + suffix for suffix in SUFFIXES)
            failures.append(Failure(table, None, None, f"missing file, expected {expected}"))
    tables = _with_splits(tables, test_fraction)
    # Where no row could be read the reason stands already, and "no rows" would only hide it.
    readable = {table: frame for table, frame in tables.items() if frame["split"].notna().any()}
    return tables, sorted({*failures, *empty_splits(readable)})


def validate(
    tables: Mapping[str, pd.DataFrame],
    limits: Limits | None = None,
    counter: TokenCounter | None = None,
) -> list[Failure]:
    """Every rule that the rows of `read_dataset` break, sorted; lengths only if both are given."""
    if (limits is None) != (counter is None):
        raise TypeError("expected both limits and counter, or neither")
    frames = with_findings(tables)
    failures: set[Failure] = set()
    if limits is not None and counter is not None:
        prompts = _distinct(frame["prompt"] for frame in frames.values())
        lengths, refused = prompt_lengths(prompts, counter)
        frames = _with_lengths(frames, lengths, counter)
        failures |= _refusals(frames, refused)
    sizes = (limits.max_prompt_tokens, limits.max_response_tokens) if limits else (None, None)
    for table, frame in frames.items():
        broken = broken_rules(frame, schema_of(table, *sizes))
        rows = frame.loc[broken["index"]]
        values = {field: rows[field].tolist() for field in broken["field"].unique()}
        for i, (file, row, field, reason) in enumerate(
            zip(rows["file"], rows["row"].tolist(), broken["field"], broken["reason"], strict=True)
        ):
            shown = _shown(values[field][i], field, reason)
            failures.add(Failure(file, row, field, reason, shown))
    return sorted(failures)


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


def empty_splits(tables: Mapping[str, pd.DataFrame]) -> list[Failure]:
    """A failure for each required table that has no row in train, or none in test."""
    return [
        Failure(
            frame["file"].cat.categories[0],
            None,
            None,
            f"{table} has no {split} rows; add rows, or change data.test_fraction",
        )
        for table, frame in tables.items()
        if table not in OPTIONAL_TABLES
        for split in ("train", "test")
        if not (frame["split"] == split).any()
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


def _with_splits(tables: dict[str, pd.DataFrame], test_fraction: float) -> dict[str, pd.DataFrame]:
    ids = {
        prompt: prompt_id(prompt)
        for frame in tables.values()
        for prompt in frame["prompt"].dropna().unique()
    }
    tables = {
        table: frame.assign(prompt_id=frame["prompt"].map(ids).astype("str"))
        for table, frame in tables.items()
    }
    split = {identity: split_of(identity, test_fraction) for identity in ids.values()}
    # Train comes last and wins where files contradict each other: `validate` then reports the rows
    # on the test side, and setting these aside leaves a clean test set.
    for stated in ("test", "train"):
        for frame in tables.values():
            split |= dict.fromkeys(
                frame.loc[frame["split"] == stated, "prompt_id"].dropna(), stated
            )
    return {
        table: frame.assign(
            split=frame["split"].fillna(frame["prompt_id"].map(split).astype("str"))
        )
        for table, frame in tables.items()
    }


def _with_lengths(
    frames: Mapping[str, pd.DataFrame], prompts: Mapping[str, int], counter: TokenCounter
) -> dict[str, pd.DataFrame]:
    """Add a `<field>_tokens` column for each text field; each distinct text is counted once."""
    texts = _distinct(
        frame[field] for frame in frames.values() for field in RESPONSES if field in frame
    )
    responses = dict(zip(texts, counter.response_lengths(texts), strict=True))
    return {
        table: frame.assign(
            **{
                f"{field}_tokens": frame[field]
                .map(prompts if field == "prompt" else responses)
                .astype("Int64")
                for field in ("prompt", *RESPONSES)
                if field in frame
            }
        )
        for table, frame in frames.items()
    }


def _refusals(frames: Mapping[str, pd.DataFrame], refused: Mapping[str, str]) -> set[Failure]:
    return {
        Failure(file, row, "prompt", refused[prompt], _shown(prompt, "prompt", refused[prompt]))
        for frame in frames.values()
        for file, row, prompt in zip(
            frame["file"], frame["row"].tolist(), frame["prompt"], strict=True
        )
        if refused and prompt in refused
    }


def _distinct(columns: Iterable[pd.Series]) -> list[str]:
    return list(dict.fromkeys(text for column in columns for text in column.dropna().unique()))


def _shown(value: Any, field: str, reason: str) -> str:
    if not isinstance(value, str):
        return "" if pd.isna(value) else str(value)
    if field == "prompt":
        value = "\n".join(turn["content"] for turn in conversation(value))
    control = _CONTROL.search(value) if reason == "control character" else None
    return excerpt(value, control.start() if control else 0)
