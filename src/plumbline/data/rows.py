"""Prepared tables to token ids."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset

from plumbline.data.tokenize import ChatEncoder

TEXTS = ("response", "chosen", "rejected")


def read_rows(path: Path) -> Dataset:
    """Read a prepared parquet file into memory, where `map` and caches can't go stale."""
    return Dataset(pq.read_table(path))


def encode_rows(rows: Dataset, encoder: ChatEncoder) -> list[dict[str, Any]]:
    """Token ids of `prompt` and of every answer column, other columns as they are."""
    columns: dict[str, list[Any]] = {"prompt": encoder.prompts(rows["prompt"])}
    for name in rows.column_names:
        if name in TEXTS:
            columns[name] = encoder.responses(rows[name])
        elif name in ("prompt_id", "margin", "clean", "label"):
            columns[name] = list(rows[name])
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
