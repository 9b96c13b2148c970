"""Tables of any length: their rows on disk, read in batches; an index of the rows in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from plumbline.data.findings import digests_of, index_of
from plumbline.data.formats import OPTIONAL_COLUMNS, TABLES
from plumbline.errors import MachineError

_TYPES = {
    "row": pa.int64(),
    "margin": pa.float64(),
    "clean": pa.bool_(),
    "label": pa.bool_(),
    "cut": pa.bool_(),
}
_FRAME_TYPES = {pa.bool_(): pd.BooleanDtype(), pa.string(): pd.StringDtype(na_value=np.nan)}


def arrow_schema(columns: Iterable[str]) -> pa.Schema:
    """The Arrow types of columns of canonical rows."""
    return pa.schema([(name, _TYPES.get(name, pa.string())) for name in columns])


@dataclass(frozen=True)
class StoredRows:
    """Canonical rows with `prompt_id` on disk, in the order of their file."""

    name: str
    """One of `formats.TABLES`."""
    file: str
    """The file that they were read from."""
    path: Path
    columns: tuple[str, ...]
    digests: Sequence[pa.Table]
    """What `findings.index_of` needs of each batch."""


@dataclass(frozen=True)
class Table:
    """The rows of one file that count, each with its split."""

    stored: StoredRows
    index: pd.DataFrame
    """As `findings.index_of` gives it, with `file`; rows that it lacks do not count."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fields(self) -> list[str]:
        """The fields that the training steps are given, less `prompt_id`."""
        optional = OPTIONAL_COLUMNS.get(self.stored.name, ())
        return [*TABLES[self.stored.name], *(c for c in optional if c in self.stored.columns)]

    def batch_count(self) -> int:
        """How many frames `batches` gives."""
        with self._reader() as reader:
            return int(reader.num_record_batches)

    def batches(self) -> Iterator[pd.DataFrame]:
        """The rows in file order, some thousands a frame: `row`, fields, `prompt_id`, `split`."""
        for number in range(self.batch_count()):
            yield self.batch(number)

    def batch(self, number: int) -> pd.DataFrame:
        """The frame that `batches` gives at a place, from 0."""
        return self._arrow_batch(number).to_pandas(types_mapper=_FRAME_TYPES.get)

    def arrow_batches(self) -> Iterator[pa.Table]:
        """As `batches`, in Arrow's form."""
        for number in range(self.batch_count()):
            yield self._arrow_batch(number)

    def _arrow_batch(self, number: int) -> pa.Table:
        with self._reader() as reader:
            batch = reader.get_batch(number)
        rows = batch.column("row").to_numpy()
        first, last = (rows[0], rows[-1]) if len(rows) else (0, 0)
        index = self.index.loc[first:last]
        kept = pa.Table.from_batches([batch]).filter(np.isin(rows, index.index))
        splits = pa.array(index["split"].astype("str"), pa.string())
        return kept.append_column("split", splits)

    @contextmanager
    def _reader(self) -> Iterator[pa.ipc.RecordBatchFileReader]:
        with pa.OSFile(str(self.stored.path)) as file, pa.ipc.open_file(file) as reader:
            yield reader


def store_rows(name: str, file: str, frames: Iterable[pd.DataFrame], scratch: Path) -> StoredRows:
    """Write canonical rows with `prompt_id` and `split` to a new file in `scratch`.

    There is at least one frame, if only an empty one. The splits go into the digests alone.

    Raises:
        MachineError: the file can't be written.
    """
    digests = []
    writer = None
    with writing(scratch), tempfile.NamedTemporaryFile(dir=scratch, delete=False) as place:
        try:
            for frame in frames:
                digests.append(digests_of(frame, name))
                schema = arrow_schema(str(name) for name in frame if name != "split")
                writer = writer or pa.ipc.new_file(place, schema)
                table = pa.Table.from_pandas(frame[schema.names], schema, preserve_index=False)
                # An empty table has no batches.
                for batch in table.to_batches() or [pa.RecordBatch.from_pylist([], schema)]:
                    writer.write_batch(batch)
        finally:
            if writer:
                writer.close()
    return StoredRows(name, file, Path(place.name), tuple(schema.names), digests)


def tables_of(stored: Iterable[StoredRows], test_fraction: float) -> dict[str, Table]:
    """Tables of stored rows, with the splits that `findings.index_of` gives them."""
    by_name = {rows.name: rows for rows in stored}
    digests = {name: rows.digests for name, rows in by_name.items()}
    # The digests have done their part.
    return {
        name: Table(
            replace(by_name[name], digests=()),
            index.assign(file=_constant(by_name[name].file, len(index))),
        )
        for name, index in index_of(digests, test_fraction).items()
    }


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Say of an error of the disk what was to be written."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"The prepared data cannot be written to {place}: {error.strerror or error}. "
            "Make room there or give write permission, or move PLUMBLINE_HOME."
        ) from error


def _constant(value: str, count: int) -> pd.Categorical[str]:
    return pd.Categorical.from_codes(np.zeros(count, dtype=np.int8), pd.Index([value]))
