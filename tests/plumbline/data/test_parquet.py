"""Files whose bytes depend on their rows alone."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plumbline.data import parquet
from plumbline.data.parquet import RowWriter

SCHEMA = pa.schema([("prompt", pa.string()), ("margin", pa.float64())])


def rows(count: int) -> pa.Table:
    prompts = [f"Prompt {i % 7}" for i in range(count)]
    return pa.table({"prompt": prompts, "margin": [i / 2 for i in range(count)]}, SCHEMA)


def write(path: Path, *parts: pa.Table) -> bytes:
    with RowWriter(path, SCHEMA) as writer:
        for part in parts:
            writer.write(part)
    return path.read_bytes()


def test_a_short_file_is_what_pyarrow_writes_at_once(tmp_path: Path) -> None:
    for count in (0, 1, 20):
        pq.write_table(rows(count), tmp_path / "whole.parquet")
        written = write(tmp_path / "rows.parquet", rows(count))
        assert written == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.parametrize("count", [9, 10, 11, 20, 35])
def test_how_the_rows_come_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 10)
    whole = rows(count)
    at_once = write(tmp_path / "a.parquet", whole)
    one_by_one = write(tmp_path / "b.parquet", *(whole.slice(i, 1) for i in range(count)))
    uneven = write(tmp_path / "c.parquet", whole.slice(0, 3), whole.slice(3, 0), whole.slice(3))
    assert at_once == one_by_one == uneven
    assert pq.read_table(tmp_path / "a.parquet").equals(whole)
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == -(-count // 10)
