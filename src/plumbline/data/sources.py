"""The readers of foreign files: jsonl, json, csv, parquet, folders of them, and the hub."""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from plumbline.data.values import Cell, Fault
from plumbline.errors import DataError

Values = dict[str, Any] | Fault
_Reader = Callable[[bytes], Iterator[tuple[int, Values]]]


class Record(NamedTuple):
    """A row of a source: where it is from, and its columns or why they could not be read."""

    file: str
    row: int
    """1-based: the line of a jsonl file, otherwise the number of the row."""
    values: Values


class HubOptions(NamedTuple):
    """What of a hub data set is meant."""

    revision: str | None = None
    data_dir: str | None = None
    split: str | None = None


def read_source(source: str, options: HubOptions) -> list[Record]:
    """All rows of a file, of the files in a folder (in the order of their names), or of a hub id.

    Nothing of the source is run. Raises `DataError` where it is missing or can't be read, or has
    no rows; a single row that can't be read is a record that says so.
    """
    path = Path(source).expanduser()
    if path.exists() and any(options):
        raise DataError(f"{source} is here: --revision, --data-dir and --split are for hub ids.")
    if path.is_dir():
        records = _read_folder(path)
    elif path.exists():
        records = _read_file(path, path.name)
    elif is_hub_id(source):
        records = _read_hub(source, options)
    else:
        raise DataError(
            f"There is no {source}; expected a file ({', '.join(READERS)}, also with .gz), a "
            "folder of such files, or a hub id as OWNER/NAME."
        )
    if not records:
        raise DataError(f"{source} has no rows.")
    return records


def is_hub_id(source: str) -> bool:
    """Whether a source that is not on this machine may be on the hub."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)) and _suffix(source) not in READERS


def _read_folder(folder: Path) -> list[Record]:
    files = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and _suffix(path.name) in READERS
    }
    shown = sorted(name for name in files if not any(p.startswith(".") for p in name.split("/")))
    if not shown:
        raise DataError(f"{folder} has no file that can be read; expected {', '.join(READERS)}.")
    return [record for name in shown for record in _read_file(files[name], name)]


def _read_file(path: Path, name: str) -> list[Record]:
    reader = READERS.get(_suffix(path.name))
    if reader is None:
        expected = ", ".join(READERS)
        raise DataError(f"Can't tell the format of {path}; expected {expected}, also with .gz.")
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        if not content.strip():
            return []
        return [Record(name, row, values) for row, values in reader(content)]
    except (OSError, EOFError, zlib.error, Fault) as error:
        raise DataError(
            f"Can't read {path}: {error}. Get the file again, or mend it, and import once more."
        ) from error


def _suffix(name: str) -> str:
    lower = name.lower()
    return Path(lower.removesuffix(".gz")).suffix


def _read_hub(name: str, options: HubOptions) -> list[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        rows = load_dataset(
            name,
            data_dir=options.data_dir,
            split=options.split or "train",
            revision=options.revision,
        )
    except (OSError, ValueError, RuntimeError, DatasetsError, HfHubHTTPError) as error:
        raise DataError(
            f"Can't load {name} from the hub ({type(error).__name__}: {error}). There is no file "
            "or folder of that name here either. Check the id, --revision, --data-dir and --split "
            "and the network; or download the data set and give its folder."
        ) from error
    return [Record(name, row, values) for row, values in enumerate(rows, start=1)]


# One format each: the content of a file to numbered rows; `Fault` where the file is no such file.


def _jsonl(content: bytes) -> Iterator[tuple[int, Values]]:
    # Only b"\n" ends a line: str.splitlines would also cut at U+2028 inside a string.
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for row, line in enumerate(lines, start=1):
        if line.strip():
            yield row, _object(line)


def _object(line: bytes) -> Values:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return Fault("not UTF-8")
    except (ValueError, RecursionError) as error:
        return Fault(f"malformed JSON ({getattr(error, 'msg', error)})")
    return value if isinstance(value, dict) else Fault("row is not an object")


def _json(content: bytes) -> Iterator[tuple[int, Values]]:
    """A list of objects; files that are called json and have an object a line are common too."""
    if not content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _jsonl(content)
        return
    try:
        values = json.loads(content.removeprefix(codecs.BOM_UTF8).decode())
    except (ValueError, RecursionError) as error:
        raise Fault(f"malformed JSON ({error})") from error
    for row, value in enumerate(values, start=1):
        yield row, value if isinstance(value, dict) else Fault("row is not an object")


def _csv(content: bytes) -> Iterator[tuple[int, Values]]:
    # A byte that is not UTF-8 becomes a lone surrogate, which validation finds in its row.
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")
    try:
        header, *lines = filter(None, csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise Fault(f"malformed csv ({error})") from error
    names = [name.strip() for name in header]
    if len(set(names)) != len(names):
        raise Fault("a column appears more than once in the header")
    for row, cells in enumerate(lines, start=1):
        if len(cells) == len(names):
            yield row, dict(zip(names, map(Cell, cells), strict=True))
        else:
            yield row, Fault(f"expected {len(names)} cells, got {len(cells)}")


def _parquet(content: bytes) -> Iterator[tuple[int, Values]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(content)).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise Fault(f"unreadable parquet ({error})") from error
    yield from enumerate(rows, start=1)


READERS: dict[str, _Reader] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""The reader of each kind of file, by its suffix."""
