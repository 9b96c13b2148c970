"""Tests of flows.data.checking: each rule on data, with a real data set that breaks it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from flows.data.checking import check_data
from plumbline.data.splits import prompt_id, split_of
from plumbline.data.validation import InvalidData
from plumbline.errors import DataError
from plumbline.params.loader import load_experiment
from plumbline.project import Project

if TYPE_CHECKING:
    from tests.conftest import SmallProject

    Check = Callable[..., dict[str, int]]


@pytest.fixture
def check(project: SmallProject) -> Check:
    def check(*overrides: str) -> dict[str, int]:
        place = Project(project.root, project.home)
        return check_data(place, load_experiment("tiny", place.params, overrides).experiment)

    return check


@pytest.fixture
def complaint(check: Check) -> Callable[..., str]:
    """The message about data that is broken; the check must leave no file behind."""

    def complaint(*overrides: str) -> str:
        with pytest.raises(DataError) as error:
            check(*overrides)
        return str(error.value)

    return complaint


def change_row(project: SmallProject, table: str, row: int, **fields: object) -> None:
    """Change fields of a row, counted from 1 as the messages do."""
    rows = project.rows(table)
    rows[row - 1] |= fields
    project.write_rows(table, rows)


def change_line(project: SmallProject, table: str, row: int, line: bytes) -> None:
    path = project.data / f"{table}.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[row - 1] = line
    path.write_bytes(b"\n".join(lines))


def test_good_data_is_counted(project, check):
    counts = check()

    for table in ("demonstrations", "preferences", "prompts"):
        assert counts[f"{table}/train"] + counts[f"{table}/test"] == len(project.rows(table))
        assert counts[f"{table}/test"] > 0
    assert not project.home.exists()


@pytest.mark.parametrize("table", ["demonstrations", "preferences", "prompts"])
def test_a_missing_file_is_named(project, complaint, table):
    (project.data / f"{table}.jsonl").unlink()

    message = complaint()

    assert f"{table}: missing file" in message
    assert f"{table}.jsonl" in message


def test_a_missing_folder_is_named(project, complaint):
    assert "no data set" in complaint("data.path=data/other")


@pytest.mark.parametrize("content", ["", "\n\n"], ids=["empty", "blank lines"])
def test_an_empty_file_is_named(project, complaint, content):
    (project.data / "preferences.jsonl").write_text(content)

    assert "preferences.jsonl" in complaint()


def test_malformed_json_is_named_by_its_row(project, complaint):
    change_line(project, "preferences", 17, b'{"prompt": "Hi", "chosen": ')

    assert "preferences.jsonl:17" in complaint()


def test_a_row_that_is_no_object_is_named(project, complaint):
    change_line(project, "prompts", 5, b"[1, 2]")

    assert "prompts.jsonl:5" in complaint()


def test_a_byte_that_is_not_utf8_is_named(project, complaint):
    change_line(project, "demonstrations", 3, b'{"prompt": "Hi", "response": "caf\xe9"}')

    message = complaint()

    assert "demonstrations.jsonl" in message
    assert "UTF-8" in message


def test_a_missing_column_is_named(project, complaint):
    rows = [
        {k: v for k, v in row.items() if k != "rejected"} for row in project.rows("preferences")
    ]
    project.write_rows("preferences", rows)

    message = complaint()

    assert "preferences.jsonl" in message
    assert "rejected" in message


@pytest.mark.parametrize("value", [7, None, True, ["a"]], ids=repr)
def test_a_field_of_another_type_is_named(project, complaint, value):
    change_row(project, "demonstrations", 9, response=value)

    assert "demonstrations.jsonl:9 response" in complaint()


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("value", ["", " \t\n"], ids=repr)
def test_blank_text_is_named(project, complaint, field, value):
    change_row(project, "preferences", 4, **{field: value})

    assert f"preferences.jsonl:4 {field}: blank text" in complaint()


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\x7f", "\x85"], ids=ascii)
def test_a_control_character_is_named_and_not_printed(project, complaint, character):
    change_row(project, "preferences", 11, chosen=f"Sure{character}[31m, here you are.")

    message = complaint()

    assert "preferences.jsonl:11 chosen: control character" in message
    assert character not in message


def test_a_pair_of_equals_is_named(project, complaint):
    change_row(project, "preferences", 6, rejected=project.rows("preferences")[5]["chosen"])

    assert "preferences.jsonl:6 chosen: chosen equals rejected" in complaint()


def test_a_pair_in_both_orders_is_named(project, complaint):
    rows = project.rows("preferences")
    first = rows[1]
    rows.append({**first, "chosen": first["rejected"], "rejected": first["chosen"]})
    project.write_rows("preferences", rows)

    message = complaint()

    assert f"preferences.jsonl:{len(rows)} chosen: same pair in both orders (see row 2)" in message


@pytest.mark.parametrize("table", ["demonstrations", "preferences", "prompts"])
def test_a_duplicate_is_named_with_the_row_that_it_repeats(project, complaint, table):
    rows = project.rows(table)
    project.write_rows(table, [*rows, rows[2]])

    assert f"{table}.jsonl:{len(rows) + 1} prompt: duplicate of row 3" in complaint()


def test_a_prompt_in_both_splits_is_named(project, complaint):
    prompt = project.rows("prompts")[0]["prompt"]
    project.write_rows(
        "prompts", [{"prompt": prompt, "split": "test"}, *project.rows("prompts")[1:]]
    )
    demonstrations = project.rows("demonstrations")
    added = {"prompt": prompt.upper(), "response": "Of course.", "split": "train"}
    project.write_rows("demonstrations", [*demonstrations, added])

    message = complaint()

    assert "prompts.jsonl:1 prompt: prompt is in train and in test" in message


@pytest.mark.parametrize(
    ("table", "field", "limit"),
    [
        ("prompts", "prompt", "data.max_prompt_tokens=56"),
        ("preferences", "rejected", "data.max_response_tokens=104"),
    ],
)
def test_a_text_that_is_too_long_is_named_with_its_length(project, complaint, table, field, limit):
    change_row(project, table, 8, **{field: "many words " * 60})

    message = complaint(limit)

    assert f"{table}.jsonl:8 {field}: {field} has" in message
    assert f"the limit is {limit.partition('=')[2]}" in message


def test_all_failures_come_together(project, complaint):
    change_row(project, "demonstrations", 1, response="")
    change_row(project, "preferences", 2, chosen="a\x00")
    change_line(project, "prompts", 3, b"{")

    message = complaint()

    assert "3 failures in 3 files" in message
    for place in ("demonstrations.jsonl:1", "preferences.jsonl:2", "prompts.jsonl:3"):
        assert place in message
    assert "quarantine" in message


def test_the_report_has_them_all_where_the_message_has_the_first(project, check):
    rows = project.rows("demonstrations")
    project.write_rows(
        "demonstrations",
        [{**row, "response": f"{i}\x00"} for i, row in enumerate(rows[:50])] + rows[50:],
    )

    with pytest.raises(InvalidData) as error:
        check()

    assert len(error.value.failures) == 50
    assert "… and 30 more" in str(error.value)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_other_formats_are_read_alike(project, check, suffix):
    import pandas as pd

    expected = check()
    path = project.data / "prompts.jsonl"
    frame = pd.DataFrame(project.rows("prompts"))
    path.unlink()
    if suffix == "csv":
        frame.to_csv(path.with_suffix(".csv"), index=False)
    else:
        frame.to_parquet(path.with_suffix(".parquet"))

    assert check() == expected


def test_added_rows_move_no_old_row(project, check):
    before = check()
    prompt = "Hi! Is this a new request?"
    project.write_rows("prompts", [{"prompt": prompt}, *project.rows("prompts")])
    turn = json.dumps([{"role": "user", "content": prompt}])
    split = split_of(prompt_id(turn), 0.2)

    after = check()

    assert {name: after[name] - before[name] for name in after if after[name] != before[name]} == {
        f"prompts/{split}": 1
    }
