"""However many batches the rows come in: the same result, and no more memory."""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from plumbline.data import formats
from plumbline.data.prepare import prepare
from plumbline.data.validation import InvalidData, Limits
from plumbline.data.values import conversation

COUNT = 60


class WordCounter:
    """One token a word."""

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        return [
            sum(len(turn["content"].split()) for turn in conversation(prompt)) for prompt in prompts
        ]

    def response_lengths(self, responses: Sequence[str]) -> list[int]:
        return [len(response.split()) for response in responses]


def write_rows(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    folder.mkdir()
    for table, of_table in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in of_table)
        (folder / f"{table}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def mixed_rows() -> dict[str, list[dict[str, Any]]]:
    """Rows that break every rule on several rows, far apart from each other."""
    draw = random.Random(0)
    turns = [
        [
            {"role": ("user", "assistant")[i % 2], "content": f"{i} of {n}"}
            for i in range(2 * turns + 1)
        ]
        for n, turns in ((n, draw.randrange(3)) for n in range(COUNT))
    ]
    pairs = [{"prompt": prompt, "chosen": "Yes", "rejected": "No"} for prompt in turns]
    pairs += [
        pairs[0],
        {**pairs[1], "chosen": "No ", "rejected": "Yes"},
        {**pairs[2], "chosen": "No"},
    ]
    pairs += [{**pairs[3], "margin": 0.5, "split": "train"}, {**pairs[4], "rejected": " "}]
    return {
        "demonstrations": [{"prompt": prompt, "response": "Yes"} for prompt in turns],
        "preferences": pairs,
        "prompts": [{"prompt": prompt} for prompt in [*turns, turns[5]]]
        + [{"prompt": turns[3], "split": "test"}],
    }


def outcome(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    """All that a run of `prepare` gives."""
    prepared = prepare(
        folder,
        out,
        test_fraction=0.3,
        on_invalid="quarantine",
        limits=Limits(6, 4),
        counter_for=lambda tables: WordCounter(),
        **options,
    )
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return {**vars(prepared), "files": files}


@pytest.mark.parametrize("long_prompts", ["refuse", "drop_turns"])
def test_the_size_of_the_batches_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_prompts: str
) -> None:
    folder = write_rows(tmp_path / "data", mixed_rows())
    whole = outcome(folder, tmp_path / "whole", long_prompts=long_prompts)
    reasons = {failure.reason.partition(" (")[0] for failure in whole["failures"]}
    assert {"duplicate of row 1", "same pair in both orders", "chosen equals rejected"} <= reasons
    assert "prompt is in train and in test" in reasons
    for rows in (16, COUNT):
        monkeypatch.setattr(formats, "BATCH_ROWS", rows)
        assert outcome(folder, tmp_path / f"by {rows}", long_prompts=long_prompts) == whole


@pytest.mark.parametrize("field", ["rejected", "margin"])
def test_a_column_that_begins_in_a_later_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setattr(formats, "BATCH_ROWS", 10)
    rows = mixed_rows()
    rows["preferences"] = [
        {"prompt": f"Q {i}", "chosen": "Yes", "rejected": "No"} | ({"margin": 2} if i == 50 else {})
        for i in range(COUNT)
    ]
    if field == "rejected":
        for row in rows["preferences"][:50]:
            del row["rejected"]
    rows["prompts"] = rows["prompts"][:COUNT]
    folder = write_rows(tmp_path / "data", rows)
    if field == "margin":
        margins = outcome(folder, tmp_path / "out")["rows"]
        assert margins["preferences/train"] + margins["preferences/test"] == COUNT
    else:
        with pytest.raises(InvalidData) as caught:
            prepare(folder, tmp_path / "out", test_fraction=0.3, on_invalid="fail")
        found = [(f.row, f.field, f.reason) for f in caught.value.failures]
        assert found == [(row, "rejected", "missing value") for row in range(1, 51)]


PEAKS = """\
import resource
import sys
from pathlib import Path
from plumbline.data import formats, parquet
from plumbline.data.prepare import prepare

formats.BATCH_ROWS = parquet.ROW_GROUP_ROWS = 1000
for folder in sys.argv[1:]:
    out = Path(folder, "out")
    prepare(Path(folder), out, test_fraction=0.1, on_invalid="fail")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    sizes = {}
    for count in (10_000, 40_000):
        pairs = [
            {"prompt": f"{i} " * 50, "chosen": f"a{i} " * 100, "rejected": f"b{i} " * 100}
            for i in range(count)
        ]
        rows = {
            "demonstrations": [{"prompt": f"d {i}", "response": "x"} for i in range(COUNT)],
            "preferences": pairs,
            "prompts": [{"prompt": f"p {i}"} for i in range(COUNT)],
        }
        folder = write_rows(tmp_path / str(count), rows)
        sizes[folder] = (folder / "preferences.jsonl").stat().st_size
    command = [sys.executable, "-c", PEAKS, *map(str, sizes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    # Kilobytes on Linux.
    small, large = (int(line) * 1024 for line in done.stdout.split())
    added = max(sizes.values()) - min(sizes.values())
    assert large - small < 0.2 * added
