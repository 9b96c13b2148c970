"""From a data set folder to the validated, split tables that the training steps read."""

import json
import os
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from plumbline.data.findings import digests_of, find
from plumbline.data.formats import OPTIONAL_TABLES, TABLES, Failure
from plumbline.data.parquet import RowWriter
from plumbline.data.splits import with_prompt_ids
from plumbline.data.tables import StoredRows, Table, arrow_schema, store_rows, tables_of, writing
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

CounterFor = Callable[[Mapping[str, Table]], TokenCounter]


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
    counter_for: CounterFor | None = None,
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

    Rows are looked at in batches and wait in files beside `out`, so that memory holds some 20 bytes
    a row, and the failures.
    """
    if long_prompts == "drop_turns" and (limits is None or counter_for is None):
        raise TypeError("expected limits and counter_for, which drop_turns needs")
    with _beside(Path(out)) as scratch:
        whole, failures = read_dataset(folder, test_fraction, scratch)
        # A tokenizer may have to be trained on the very rows, which needs them to be there.
        countable = counter_for is not None and set(TABLES) - OPTIONAL_TABLES <= set(whole)
        counter = counter_for(whole) if counter_for and countable else None
        tables = whole
        if long_prompts == "drop_turns" and counter and counter_for and limits:
            tables, counter = _drop_turns(
                whole, limits.max_prompt_tokens, counter, counter_for, scratch
            )
        merged = sum(map(len, whole.values())) - sum(map(len, tables.values()))
        failures = sorted({*failures, *validate(tables, limits if counter else None, counter)})
        if failures and (on_invalid == "fail" or any(failure.row is None for failure in failures)):
            raise InvalidData(failures)
        reasons = _reasons(failures)
        kept = {name: _without(table, reasons.get(name, {})) for name, table in tables.items()}
        if emptied := empty_splits(kept):
            raise InvalidData(sorted({*failures, *emptied}))
        rows: dict[str, int] = {}
        cut: dict[str, int] = {}
        with writing(Path(out)), _replacing(Path(out), scratch) as new:
            for name, table in kept.items():
                for split, written in _write_splits(table, new / name).items():
                    rows[f"{name}/{split}"], cut[f"{name}/{split}"] = written.rows, written.cut
            for name, bad in reasons.items():
                _write_quarantine(whole[name], bad, new / "quarantine" / f"{name}.jsonl")
            report = json.dumps(failures_table(failures), ensure_ascii=False, indent=1)
            (new / "failures.json").write_text(report + "\n", encoding="utf-8")
    return Prepared(
        rows=rows,
        failures=failures,
        quarantined=sum(map(len, reasons.values())),
        cut=cut if long_prompts == "drop_turns" else {},
        merged=merged,
    )


def _drop_turns(
    whole: dict[str, Table],
    max_tokens: int,
    counter: TokenCounter,
    counter_for: CounterFor,
    scratch: Path,
) -> tuple[dict[str, Table], TokenCounter]:
    """The tables with their long prompts cut, less the merged rows, and the counter for them."""
    tables = whole
    while True:
        cut = {name: _cut(table, max_tokens, counter, scratch) for name, table in tables.items()}
        if not any(one.prompts for one in cut.values()):
            return tables, counter
        tables = _without_merged(whole, cut)
        # A tokenizer that is trained on the rows counts otherwise, now that they are shorter.
        counter = counter_for(tables)


class _Cut(NamedTuple):
    """A table with its long prompts cut."""

    rows: StoredRows
    """With the ids and splits of the whole prompts."""
    digests: list[pa.Table]
    """Of the same rows, but with the ids of the cut prompts."""
    prompts: int
    """How many prompts were cut."""


def _cut(table: Table, max_tokens: int, counter: TokenCounter, scratch: Path) -> _Cut:
    digests: list[pa.Table] = []
    counts: list[int] = []

    def frames() -> Iterator[pd.DataFrame]:
        for frame in table.batches():
            prompts = frame["prompt"].dropna().unique().tolist()
            shorter = shortened(prompts, max_tokens, counter)
            counts.append(len(shorter))
            cut = frame["prompt"].map(shorter).astype("str")
            before = frame.get("cut", False)
            frame = frame.assign(prompt=cut.fillna(frame["prompt"]), cut=cut.notna() | before)
            digests.append(digests_of(with_prompt_ids(frame), table.stored.name))
            yield frame

    rows = store_rows(table.stored.name, table.stored.file, frames(), scratch)
    return _Cut(rows, digests, sum(counts))


def _without_merged(whole: dict[str, Table], cut: Mapping[str, _Cut]) -> dict[str, Table]:
    """Leave out the rows that break a rule on several rows only since prompts were cut."""
    # Each row states its split by now, so that the fraction decides nothing.
    tables = tables_of((one.rows for one in cut.values()), 0)
    by_cut_prompt = tables_of((replace(one.rows, digests=one.digests) for one in cut.values()), 0)
    indexes = {name: table.index for name, table in by_cut_prompt.items()}
    before = find({name: table.index for name, table in whole.items()})
    # Leaks go first: a row of train must not give way to one of test that goes itself.
    for findings in (["leaks_to"], ["duplicate_of", "reversed_of"]):
        found = find(indexes)
        indexes = {
            name: index.drop(_rows_with(findings, found[name], before[name]))
            for name, index in indexes.items()
        }
    return {
        name: replace(table, index=table.index.loc[indexes[name].index])
        for name, table in tables.items()
    }


def _rows_with(findings: Sequence[str], found: pd.DataFrame, before: pd.DataFrame) -> list[int]:
    """The rows that have one of the findings and did not have it before."""
    rows: set[int] = set()
    for finding in found.columns.intersection(list(findings)):
        rows |= {*found[finding].dropna().index} - {*before[finding].dropna().index}
    return list(rows)


def _without(table: Table, rows: Collection[int]) -> Table:
    return replace(table, index=table.index[~table.index.index.isin(list(rows))])


def _reasons(failures: Sequence[Failure]) -> dict[str, dict[int, list[str]]]:
    """What is wrong with each bad row, by table and row number."""
    reasons: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for failure in failures:
        if failure.row is not None:
            field = "" if failure.field is None else f"{failure.field}: "
            reasons[Path(failure.file).stem][failure.row].append(field + failure.reason)
    return reasons


class _Written(NamedTuple):
    rows: int
    cut: int
    """Rows whose prompt lost turns."""


def _write_splits(table: Table, folder: Path) -> dict[str, _Written]:
    folder.mkdir()
    columns = [*table.fields, "prompt_id"]
    rows: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    with ExitStack() as files:
        writers = {
            split: files.enter_context(
                RowWriter(folder / f"{split}.parquet", arrow_schema(columns))
            )
            for split in ("train", "test")
        }
        for batch in table.arrow_batches():
            for split, writer in writers.items():
                own = batch.filter(pc.equal(batch["split"], split))
                writer.write(own.select(columns))
                rows[split] += len(own)
                cut[split] += sum(own["cut"].to_pylist()) if "cut" in own.column_names else 0
    return {split: _Written(rows[split], cut[split]) for split in writers}


def _write_quarantine(table: Table, reasons: Mapping[int, list[str]], path: Path) -> None:
    """One line a bad row: row, reasons, and its canonical fields as far as they could be read."""
    path.parent.mkdir(exist_ok=True)
    waiting = sorted(reasons)
    with path.open("w", encoding="utf-8") as file:

        def write(rows: Sequence[int], fields: Mapping[int, Mapping[str, Any]]) -> None:
            for row in rows:
                read = fields.get(row, dict.fromkeys(table.fields))
                record = {"row": row, "reasons": reasons[row], **read}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

        for batch in table.arrow_batches():
            bad = batch.filter(pc.is_in(batch["row"], pa.array(waiting, pa.int64())))
            fields = bad.select(table.fields).to_pylist()
            last = bisect_right(waiting, max(batch["row"].to_pylist(), default=0))
            write(waiting[:last], dict(zip(bad["row"].to_pylist(), fields, strict=True)))
            waiting = waiting[last:]
        # Rows below the last one that could be read.
        write(waiting, {})


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """An empty folder that goes in the end, on the file system of `out`."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)
    with scratch as folder:
        yield Path(folder)


@contextmanager
def _replacing(out: Path, scratch: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` at the end, unless something is raised before."""
    new = scratch / "new"
    new.mkdir()
    yield new
    if out.exists():
        os.replace(out, scratch / "old")
    os.replace(new, out)
