"""Parquet files that are written as their rows come."""

from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_ROWS = 2**15
"""Rows that are compressed together, and that wait in memory for it."""


class RowWriter:
    """A context that writes rows in groups of `ROW_GROUP_ROWS`: the same rows give the same bytes.

    How many rows a call hands over makes no difference.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Open the file; OSError as all the methods raise where it can't be written."""
        self._file = pq.ParquetWriter(path, schema)
        self._waiting = schema.empty_table()
        self._groups = 0

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def write(self, rows: pa.Table) -> None:
        """Add rows that have exactly the columns of the schema."""
        self._waiting = pa.concat_tables([self._waiting, rows])
        while len(self._waiting) >= ROW_GROUP_ROWS:
            self._write_group(self._waiting.slice(0, ROW_GROUP_ROWS))
            self._waiting = self._waiting.slice(ROW_GROUP_ROWS)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the rows that wait; a file without rows has one group without rows."""
        try:
            if error is None and (len(self._waiting) or not self._groups):
                self._write_group(self._waiting)
        finally:
            self._file.close()

    def _write_group(self, rows: pa.Table) -> None:
        # In one piece, since where a column's chunks end shows in the bytes.
        self._file.write_table(rows.combine_chunks(), ROW_GROUP_ROWS)
        self._groups += 1
