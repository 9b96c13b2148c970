"""From a data set folder to the validated, split tables that the training steps read."""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from plumbline.data.formats import OPTIONAL_COLUMNS, OPTIONAL_TABLES, TABLES, Failure
from plumbline.data.schemas import with_findings
from plumbline.data.splits import prompt_id
from plumbline.data.turns import shortened
from plumbline.data.validation import (
    InvalidData,
    Limits,
    TokenCounter,
    empty_splits,
    failures_table,
    read_dataset,
    validate,
)
from plumbline.errors import MachineError

_ARROW_TYPES = {"margin": pa.float64(), "clean": pa.bool_(), "label": pa.bool_()}


@dataclass(frozen=True)
class Prepared:
    """What was written, what was wrong, and what became of it."""

    rows: dict[str, int]
    """Rows written, by "table/split"."""
    failures: list[Failure]
    quarantined: int
    """Rows set aside because of a failure."""
    cut: dict[str, int]
    """Rows written whose prompt lost turns, by "table/split"; empty unless turns are dropped."""
    merged: int
    """Rows left out because their prompt, cut, only repeats or contradicts another row."""


def prepare(
    folder: Path,
    out: Path,
    *,
    test_fraction: float,
    on_invalid: Literal["fail", "quarantine"],
    limits: Limits | None = None,
    counter_for: Callable[[Mapping[str, pd.DataFrame]], TokenCounter] | None = None,
    long_prompts: Literal["refuse", "drop_turns"] = "refuse",
) -> Prepared:
    """Read, validate and split a data set, and write it to `out`, whole or not at all.

    Writes `<table>/<split>.parquet` (rows in file order; the same rows give the same bytes) and
    `failures.json`; with "quarantine" also `quarantine/<table>.jsonl`, the rows that were set
    aside, with their reasons. What `out` held before is replaced. Raises `InvalidData`, before
    anything is written, on any failure with "fail", and with "quarantine" on a failure that no
    row carries: a missing file or column, an empty file, a split that is left without rows.

    Lengths are checked where `limits` are given; `counter_for` then makes the counter from the
    tables as they were read, since a tokenizer may be trained on them.

    With "drop_turns", prompts over the limit lose their oldest turns (`turns.shortened`); the
    split and `prompt_id` stay those of the whole prompt. Where only the cut makes a row repeat
    another, or puts a test row's prompt in train, the row is left out and counted as `merged`.
    """
    if long_prompts == "drop_turns" and (limits is None or counter_for is None):
        raise TypeError("expected limits and counter_for, which drop_turns needs")
    whole, failures = read_dataset(folder, test_fraction)
    # A tokenizer may have to be trained on the very rows, which needs them to be there.
    countable = counter_for is not None and set(TABLES) - OPTIONAL_TABLES <= set(whole)
    counter = counter_for(whole) if counter_for and countable else None
    tables = whole
    if long_prompts == "drop_turns" and counter and counter_for and limits:
        tables, counter = _drop_turns(whole, limits.max_prompt_tokens, counter, counter_for)
    merged = sum(map(len, whole.values())) - sum(map(len, tables.values()))
    failures = sorted({*failures, *validate(tables, limits if counter else None, counter)})
    if failures and (on_invalid == "fail" or any(failure.row is None for failure in failures)):
        raise InvalidData(failures)
    reasons = _reasons(failures)
    kept = {
        table: frame[~frame["row"].isin(reasons.get(table, {}))] for table, frame in tables.items()
    }
    if emptied := empty_splits(kept):
        raise InvalidData(sorted({*failures, *emptied}))
    splits = {
        f"{table}/{split}": frame[frame["split"] == split]
        for table, frame in kept.items()
        for split in ("train", "test")
    }
    with _replacing(Path(out)) as new:
        for name, frame in splits.items():
            _write_parquet(frame, name.split("/")[0], new / f"{name}.parquet")
        for table, rows in reasons.items():
            _write_quarantine(whole[table], table, rows, new / "quarantine" / f"{table}.jsonl")
        report = json.dumps(failures_table(failures), ensure_ascii=False, indent=1)
        (new / "failures.json").write_text(report + "\n", encoding="utf-8")
    return Prepared(
        rows={name: len(frame) for name, frame in splits.items()},
        failures=failures,
        quarantined=sum(map(len, reasons.values())),
        cut={
            name: int((frame["prompt"] != whole[name.split("/")[0]]["prompt"][frame.index]).sum())
            for name, frame in splits.items()
            if long_prompts == "drop_turns"
        },
        merged=merged,
    )


def _drop_turns(
    whole: dict[str, pd.DataFrame],
    max_tokens: int,
    counter: TokenCounter,
    counter_for: Callable[[Mapping[str, pd.DataFrame]], TokenCounter],
) -> tuple[dict[str, pd.DataFrame], TokenCounter]:
    """The tables with their long prompts cut, less the merged rows, and the counter for them."""
    tables = whole
    while True:
        prompts = pd.concat([frame["prompt"] for frame in tables.values()]).dropna().unique()
        cut = shortened(prompts.tolist(), max_tokens, counter)
        if not cut:
            return tables, counter
        tables = {
            table: frame.assign(prompt=frame["prompt"].map(cut).fillna(frame["prompt"]))
            for table, frame in tables.items()
        }
        tables = _without_merged(whole, tables)
        # A tokenizer that is trained on the rows counts otherwise, now that they are shorter.
        counter = counter_for(tables)


def _without_merged(
    whole: dict[str, pd.DataFrame], cut: dict[str, pd.DataFrame]
) -> dict[str, pd.DataFrame]:
    """Leave out the rows that break a rule on several rows only since prompts were cut."""
    tables = {
        table: frame.assign(
            prompt_id=frame["prompt"].map(prompt_id, na_action="ignore").astype("str")
        )
        for table, frame in cut.items()
    }
    before = with_findings(whole)
    # Leaks go first: a row of train must not give way to one of test that goes itself.
    for findings in (["leaks_to"], ["duplicate_of", "reversed_of"]):
        found = with_findings(tables)
        for table, frame in tables.items():
            merged = pd.Series(False, index=frame.index)
            for finding in found[table].columns.intersection(findings):
                known = before[table].loc[frame.index, finding].notna()
                merged |= found[table][finding].notna() & ~known
            tables[table] = frame[~merged]
    return {table: cut[table].loc[frame.index] for table, frame in tables.items()}


def _reasons(failures: Sequence[Failure]) -> dict[str, dict[int, list[str]]]:
    """What is wrong with each bad row, by table and row number."""
    reasons: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for failure in failures:
        if failure.row is not None:
            field = "" if failure.field is None else f"{failure.field}: "
            reasons[Path(failure.file).stem][failure.row].append(field + failure.reason)
    return reasons


def _columns(frame: pd.DataFrame, table: str) -> list[str]:
    optional = [name for name in OPTIONAL_COLUMNS.get(table, ()) if name in frame]
    return [*TABLES[table], *optional]


def _write_parquet(frame: pd.DataFrame, table: str, path: Path) -> None:
    columns = [*_columns(frame, table), "prompt_id"]
    schema = pa.schema([(name, _ARROW_TYPES.get(name, pa.string())) for name in columns])
    # Without pandas' own metadata the bytes depend on the rows alone.
    rows = pa.Table.from_pandas(frame[columns], schema, preserve_index=False)
    path.parent.mkdir(exist_ok=True)
    pq.write_table(rows.replace_schema_metadata(None), path)


def _write_quarantine(
    frame: pd.DataFrame, table: str, reasons: Mapping[int, list[str]], path: Path
) -> None:
    """One line a bad row: row, reasons, and its canonical fields as far as they could be read."""
    columns = _columns(frame, table)
    bad = frame.loc[frame["row"].isin(reasons), ["row", *columns]].astype(object)
    fields = bad.where(bad.notna(), None).set_index("row").to_dict("index")
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in sorted(reasons):
            read = fields.get(row, dict.fromkeys(columns))
            record = {"row": row, "reasons": reasons[row], **{str(k): v for k, v in read.items()}}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` at the end, unless something is raised before."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A sibling, so that the rename stays on one file system and is atomic.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            yield new
            if out.exists():
                os.replace(out, Path(scratch, "old"))
            os.replace(new, out)
    except OSError as error:
        raise MachineError(
            f"The prepared data cannot be written to {out}: {error.strerror or error}. "
            "Make room there or give write permission, or move PLUMBLINE_HOME."
        ) from error
