"""The rules on several values, rows or tables, found on digests: the texts need not be in memory.

A *finding* says that a row breaks such a rule, and names the evidence (the other row). Every row
keeps some 20 bytes for this, its *index*: which prompt and which fields it has, as numbers that are
equal where the digests (128 bits) are.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from plumbline.data.formats import TABLES
from plumbline.data.splits import split_of

Numbers = np.ndarray[Any, Any]

FINDINGS: dict[str, Any] = {
    "duplicate_of": "Int64",
    "leaks_to": "str",
    "same_pair": "boolean",
    "reversed_of": "Int64",
}
"""Every finding and the type of its evidence; the last two are of preferences alone."""

_DIGEST = pa.binary(16)
_DIGESTS = pa.schema(
    [
        ("row", pa.int64()),
        ("split", pa.string()),
        ("prompt", _DIGEST),
        ("fields", _DIGEST),
        ("order", pa.int8()),
    ]
)
_SPLITS = ["train", "test"]
# Canonical texts are valid Unicode, so that none of them holds it.
_BETWEEN_FIELDS = "\ud800"
_NONE = -1


def digests_of(frame: pd.DataFrame, table: str) -> pa.Table:
    """What `index_of` needs of canonical rows with `prompt_id`.

    `prompt` is a digest of `prompt_id`, and `fields` one of the fields that make a row a duplicate
    of another, without the space around them; null where one of these is null. The responses of a
    pair count in any order, and `order` says which it is: -1, 0 where they are equal, or 1.
    """
    columns = [_cells(frame, field) for field in TABLES[table]]
    fields, orders = [], []
    for cells in zip(*columns, strict=True):
        values = [cell.strip() if isinstance(cell, str) else cell for cell in cells]
        order = _order(values[1], values[2]) if table == "preferences" else -1
        if order > 0:
            values[1:] = values[:0:-1]
        orders.append(order)
        fields.append(None if None in values else _digest(values))
    # The id is a digest itself, of which 128 bits are enough.
    prompts = [text and bytes.fromhex(text[:32]) for text in _cells(frame, "prompt_id")]
    arrays = {
        "row": _cells(frame, "row"),
        "split": _cells(frame, "split"),
        "prompt": prompts,
        "fields": fields,
        "order": orders,
    }
    return pa.Table.from_pydict(arrays, schema=_DIGESTS)


def index_of(
    digests: Mapping[str, Sequence[pa.Table]], test_fraction: float
) -> dict[str, pd.DataFrame]:
    """One small row for each row of each table: `prompt`, `fields`, `order`, `split`.

    The digests become numbers from 0, which for prompts are the same in all tables; -1 stands for
    null. A split that a row states counts for that prompt in all tables, so that no prompt is in
    train here and in test there; all other prompts are split by hash (`splits.split_of`). A row
    without a prompt has no split but the one that it states.
    """
    whole = {
        table: pa.concat_tables([_DIGESTS.empty_table(), *parts])
        for table, parts in digests.items()
    }
    if not whole:
        return {}
    every = pa.concat_tables(whole.values())
    prompts, distinct = _numbers(every["prompt"])
    stated = pc.index_in(every["split"], pa.array(_SPLITS)).fill_null(_NONE).to_numpy()
    by_hash = [
        _SPLITS.index(split_of(digest.hex(), test_fraction)) for digest in distinct.to_pylist()
    ]
    # The number of a null is that of the last one.
    split_of_prompt = np.array([*by_hash, _NONE], dtype="int8")
    # Train comes last and wins where files contradict each other: the rows on the test side are
    # then reported, and setting these aside leaves a clean test set.
    for split in ("test", "train"):
        stating = prompts[(stated == _SPLITS.index(split)) & (prompts != _NONE)]
        split_of_prompt[stating] = _SPLITS.index(split)
    splits = np.where(stated == _NONE, split_of_prompt[prompts], stated)
    starts = np.cumsum([rows.num_rows for rows in whole.values()])[:-1]
    return {
        table: pd.DataFrame(
            {
                "prompt": own_prompts,
                "fields": _numbers(rows["fields"])[0],
                "order": rows["order"].to_numpy(),
                "split": pd.Categorical.from_codes(own_splits, pd.Index(_SPLITS)),
            },
            index=pd.Index(rows["row"].to_numpy(), name="row"),
        )
        for (table, rows), own_prompts, own_splits in zip(
            whole.items(), np.split(prompts, starts), np.split(splits, starts), strict=True
        )
    }


def find(indexes: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The rows of each table that have a finding, and their findings, by row number.

    Args:
        indexes: as `index_of` gives them, with a column `file`.
    """
    leaks = _leaks(indexes)
    found = {}
    for table, index in indexes.items():
        columns = {"duplicate_of": _duplicates(index), "leaks_to": leaks[table]}
        if table == "preferences":
            columns |= {"same_pair": _same_pairs(index), "reversed_of": _reversed_pairs(index)}
        found[table] = pd.DataFrame(columns)
    return found


def with_findings(frame: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Canonical rows with a column for each finding, null where there is none."""
    names = [str(name) for name in found]
    return frame.assign(
        **{name: frame["row"].map(found[name]).astype(FINDINGS[name]) for name in names}
    )


def _cells(frame: pd.DataFrame, field: str) -> list[Any]:
    cells: list[Any] = pa.array(frame[field], from_pandas=True).to_pylist()
    return cells


def _order(chosen: str | None, rejected: str | None) -> int:
    if chosen is None or rejected is None:
        return -1
    return (chosen > rejected) - (chosen < rejected)


def _digest(values: Sequence[object]) -> bytes:
    text = _BETWEEN_FIELDS.join(map(str, values))
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _numbers(digests: pa.ChunkedArray) -> tuple[Numbers, pa.Array]:
    """The number of each digest, and the digest of each number."""
    encoded = digests.combine_chunks().dictionary_encode()
    return encoded.indices.fill_null(_NONE).to_numpy(), encoded.dictionary


# Each finding: of the rows that have it, the evidence.


def _duplicates(index: pd.DataFrame) -> pd.Series:
    """The first row with the same fields, for every later one; margin and clean do not count."""
    same = index[(index["fields"] != _NONE) & index.duplicated(["fields", "order"], keep=False)]
    rows = same.index.to_series()
    first = rows.groupby([same["fields"], same["order"]]).transform("min")
    return first[first < rows]


def _same_pairs(index: pd.DataFrame) -> pd.Series:
    """Chosen equals rejected."""
    return pd.Series(True, index=index.index[index["order"] == 0])


def _reversed_pairs(index: pd.DataFrame) -> pd.Series:
    """The first row that says the opposite, for every later one."""
    pairs = index[(index["fields"] != _NONE) & (index["order"] != 0)]
    pairs = pairs[pairs["fields"].duplicated(keep=False)]
    rows = pairs.index.to_series()
    forward, backward = (
        rows.where(pairs["order"] == order).groupby(pairs["fields"]).transform("min")
        for order in (-1, 1)
    )
    opposite = backward.where(pairs["order"] == -1, forward)
    return opposite[opposite < rows]


def _leaks(indexes: Mapping[str, pd.DataFrame]) -> dict[str, pd.Series]:
    """For each test row whose prompt is also in train: where it is first in train."""

    def prompts(split: str) -> Numbers:
        parts = [index["prompt"][index["split"] == split].unique() for index in indexes.values()]
        return np.unique(np.concatenate(parts)) if parts else np.array([])

    both = np.setdiff1d(np.intersect1d(prompts("train"), prompts("test")), [_NONE])
    places: dict[int, str] = {}
    for index in indexes.values():
        train = index[(index["split"] == "train") & index["prompt"].isin(both)]
        for row, prompt, file in zip(train.index, train["prompt"], train["file"], strict=True):
            places.setdefault(prompt, f"{file} row {row}")
    test = {table: index["prompt"][index["split"] == "test"] for table, index in indexes.items()}
    return {table: rows[rows.isin(both)].map(places) for table, rows in test.items()}
