"""Foreign files to records, and the hub's rows."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plumbline.data.convert import FORMATS
from plumbline.data.selection import select
from plumbline.data.sources import HubOptions, Record, is_hub_id, read_source
from plumbline.data.values import Fault
from plumbline.errors import DataError

ROWS = [{"a": "Größe\u2028x", "b": "1"}, {"a": "", "b": "2"}]
CSV = "a,b\r\nGröße\u2028x,1\r\n\r\n,2\r\n"


def read(path: Path) -> list[Record]:
    return read_source(str(path), HubOptions())


def as_jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def reasons(path: Path) -> list[tuple[int, str | None]]:
    return [(r.row, str(r.values) if isinstance(r.values, Fault) else None) for r in read(path)]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "mark"])
@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".jsonl", as_jsonl(ROWS)),
        (".json", as_jsonl(ROWS)),
        (".json", json.dumps(ROWS, indent=1)),
        (".csv", CSV),
    ],
)
def test_every_text_format_gives_the_same_rows(
    tmp_path: Path, suffix: str, text: str, mark: bytes, packed: bool
) -> None:
    content = mark + text.encode()
    path = tmp_path / f"x{suffix}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)

    records = read(path)

    assert [record.values for record in records] == ROWS
    assert [(record.file, record.row) for record in records] == [(path.name, 1), (path.name, 2)]


def test_parquet_gives_lists_and_texts(tmp_path: Path) -> None:
    rows = [{"a": [{"role": "user", "content": "x"}], "b": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")

    assert [record.values for record in read(tmp_path / "x.parquet")] == rows


def test_a_row_that_can_not_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}')

    assert reasons(path) == [
        (1, None),
        (3, "malformed JSON (Expecting value)"),
        (4, "row is not an object"),
        (5, "not UTF-8"),
        (6, None),
    ]


def test_a_csv_row_with_other_cells_than_the_header_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n1\n1,2,3\n")

    assert reasons(path) == [
        (1, None),
        (2, "expected 2 cells, got 1"),
        (3, "expected 2 cells, got 3"),
    ]


def test_a_csv_byte_that_is_not_utf_8_is_found_in_its_row(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"instruction,output\na,\xff\nb,c\n")

    selection = select(read(path), FORMATS["alpaca"])

    assert selection.rows == [{"prompt": "b", "response": "c"}]
    assert [(left.record.row, left.reason) for left in selection.left_out] == [
        (1, "response: not valid Unicode (a lone surrogate)")
    ]


def test_the_rows_of_a_json_list_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1}, 3]')

    assert reasons(path) == [(1, None), (2, "row is not an object")]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.csv", "a/y.jsonl.gz", ".hidden/x.jsonl", "a/.x.jsonl", "README"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = b"a\n1\n" if name.endswith("csv") else b'{"a": "1"}\n'
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)

    assert [record.file for record in read(tmp_path)] == ["a/y.jsonl.gz", "a/z.csv", "b.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.txt", b"x", "expected .jsonl, .json, .csv, .parquet, also with .gz"),
        ("x.jsonl", b" \n\n", "has no rows"),
        ("x.jsonl.gz", b"no gzip", "Can't read"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0)[:-9], "Can't read"),
        ("x.parquet", b"no parquet", "unreadable parquet"),
        ("x.json", b"[{", "malformed JSON"),
        ("x.csv", b'a,b\n"1"x,2\n', "malformed csv"),
        ("x.csv", b"a,a\n1,2\n", "more than once in the header"),
    ],
)
def test_a_file_that_can_not_be_read_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(DataError) as raised:
        read(path)

    assert expected in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_folder_without_a_file_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")

    with pytest.raises(DataError, match="no file that can be read"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["nothing.jsonl", "data/nothing.jsonl.gz", "./owner/name", "name"])
def test_what_is_neither_here_nor_a_hub_id_is_missing(name: str) -> None:
    with pytest.raises(DataError, match=r"There is no .*expected a file.*hub id as OWNER/NAME"):
        read_source(name, HubOptions())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Anthropic/hh-rlhf", True),
        ("a_b/c.d-e", True),
        ("csv", False),
        ("../x", False),
        ("a/b/c", False),
        ("a/b.csv.gz", False),
    ],
)
def test_a_hub_id_has_an_owner_and_no_suffix(source: str, expected: bool) -> None:
    assert is_hub_id(source) is expected


def test_a_hub_data_set_is_loaded_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, **options: Any) -> datasets.Dataset:
        asked.append((name, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = read_source("owner/name", HubOptions("abc", "folder", None))

    assert asked == [
        ("owner/name", {"revision": "abc", "data_dir": "folder", "split": "train"}),
    ]
    assert records == [Record("owner/name", 1, ROWS[0]), Record("owner/name", 2, ROWS[1])]


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("doesn't exist"),
        datasets.exceptions.DatasetGenerationError("broken"),
        ConnectionError("offline"),
        ValueError("Unknown split"),
    ],
)
def test_a_hub_data_set_that_does_not_load_says_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(name: str, **options: Any) -> datasets.Dataset:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)

    with pytest.raises(DataError, match=f"Can't load owner/name .*{error}.*Check the id"):
        read_source("owner/name", HubOptions())


@pytest.mark.parametrize("options", [HubOptions("r"), HubOptions(None, "d"), HubOptions(split="s")])
def test_options_of_the_hub_are_refused_for_files(tmp_path: Path, options: HubOptions) -> None:
    with pytest.raises(DataError, match="are for hub ids"):
        read_source(str(tmp_path), options)
