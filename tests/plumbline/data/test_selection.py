"""What is left out of a source, why, and how it is told."""

import json
from pathlib import Path
from typing import Any

from plumbline.data.convert import FORMATS
from plumbline.data.formats import Failure
from plumbline.data.selection import count_reasons, select, write_left_out
from plumbline.data.sources import Record
from plumbline.data.values import Fault


def pair(prompt: Any, chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def records_of(*values: Any, file: str = "x.jsonl") -> list[Record]:
    """Records in every second line of a file."""
    return [Record(file, 2 * i + 1, row) for i, row in enumerate(values)]


GOOD = pair("p", "a", "b")
BAD: list[tuple[Any, str]] = [
    (pair("p", "a ", "b"), "prompt: duplicate of x.jsonl:1"),
    (pair("p", "b", "a"), "chosen: same pair in both orders (see x.jsonl:1)"),
    (pair("q", "a", " a"), "chosen: chosen equals rejected"),
    (pair("q", "", "b"), "chosen: blank text"),
    (pair("q", "a", "\n"), "rejected: blank text"),
    (pair(" ", "a", "b"), "prompt: blank text"),
    (pair("q", "a\x00", "b"), "chosen: control character"),
    (pair("q\x1b", "a", "b"), "prompt: control character"),
    (pair("q", "a\ud800", "b"), "chosen: not valid Unicode (a lone surrogate)"),
    (pair("q", "a", "b", margin=-1), "margin: expected a finite margin of at least 0"),
    (pair("q", None, "b"), "chosen: missing value"),
    (Fault("not UTF-8"), "not UTF-8"),
]


def test_every_bad_row_is_left_out_with_its_place_and_reason() -> None:
    selection = select(records_of(GOOD, *(row for row, _ in BAD)), FORMATS["dpo-pairs"])

    assert selection.rows == [GOOD]
    found = [(left.record.row, left.failures) for left in selection.left_out]
    assert [row for row, _ in found] == list(range(3, 2 * len(BAD) + 2, 2))
    for (_, expected), (row, failures) in zip(BAD, found, strict=True):
        assert all((failure.file, failure.row) == ("x.jsonl", row) for failure in failures)
        reasons = [f"{f.field}: {f.reason}" if f.field else f.reason for f in failures]
        assert expected in reasons


def test_rows_are_named_by_their_own_files() -> None:
    files = [Record("a.csv", 1, Fault("x")), Record("a.csv", 7, GOOD), Record("b.csv", 1, GOOD)]

    (_, duplicate) = select(files, FORMATS["dpo-pairs"]).left_out

    assert duplicate.failures == [
        Failure("b.csv", 1, "prompt", "duplicate of a.csv:7", value=duplicate.failures[0].value)
    ]


def test_reasons_are_counted_whatever_row_they_name() -> None:
    other = pair("q", "a", "b")
    twice = [GOOD, other, GOOD, other, Fault("not UTF-8")]

    left_out = select(records_of(*twice), FORMATS["dpo-pairs"]).left_out

    assert list(count_reasons(left_out).items()) == [
        ("prompt: duplicate of another row", 2),
        ("not UTF-8", 1),
    ]


def test_a_good_source_has_nothing_left_out() -> None:
    rows = [pair(f"p{i}", "a", "b") for i in range(3)]
    selection = select(records_of(*rows), FORMATS["dpo-pairs"])
    assert (selection.rows, selection.left_out) == (rows, [])


def test_demonstrations_are_held_to_the_rules_too() -> None:
    rows = [{"instruction": text, "output": "b"} for text in ("a", "a", " ")]
    left_out = select(records_of(*rows), FORMATS["alpaca"]).left_out
    assert [(left.record.row, left.reason) for left in left_out] == [
        (3, "prompt: duplicate of another row"),
        (5, "prompt: blank text"),
    ]


def test_what_is_left_out_is_written_with_the_row_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "made" / "x.jsonl"
    bad = pair("q", "é\ud800", "b")
    left_out = select(records_of(GOOD, bad, Fault("not UTF-8")), FORMATS["dpo-pairs"]).left_out

    write_left_out(path, left_out)

    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    reason = "chosen: not valid Unicode (a lone surrogate)"
    assert lines == [
        {"file": "x.jsonl", "row": 3, "reasons": [reason], "record": bad},
        {"file": "x.jsonl", "row": 5, "reasons": ["not UTF-8"], "record": None},
    ]
    write_left_out(path, [])
    assert not path.exists()
