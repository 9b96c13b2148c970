"""A whole data set: splits that agree between files, and one report on all that is wrong."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from plumbline import second_process
from plumbline.data import formats
from plumbline.data.formats import Failure
from plumbline.data.validation import (
    InvalidData,
    Limits,
    empty_splits,
    failures_table,
    format_report,
    read_dataset,
    validate,
)
from plumbline.data.values import conversation
from plumbline.errors import DataError
from plumbline.second_process import WORTH_IT

COUNT = 40


class WordCounter:
    """One token a word, and one more for the end of a response."""

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        return [
            sum(len(turn["content"].split()) for turn in conversation(prompt)) for prompt in prompts
        ]

    def response_lengths(self, responses: Sequence[str]) -> list[int]:
        return [len(response.split()) + 1 for response in responses]


def good_tables() -> dict[str, list[dict[str, Any]]]:
    prompts = [f"Question {i}?" for i in range(COUNT)]
    return {
        "demonstrations": [{"prompt": prompt, "response": "Yes"} for prompt in prompts],
        "preferences": [{"prompt": p, "chosen": "Yes", "rejected": "No"} for p in prompts],
        "prompts": [{"prompt": prompt.upper()} for prompt in reversed(prompts)],
        "ratings": [{"prompt": prompt, "response": "Yes", "label": 1} for prompt in prompts],
    }


def write(folder: Path, tables: dict[str, list[dict[str, Any]]]) -> Path:
    folder.mkdir(exist_ok=True)
    for table, rows in tables.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{table}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def splits_of(folder: Path, fraction: float = 0.5) -> dict[str, set[str]]:
    """The splits that each prompt id is found in, over all tables."""
    splits: dict[str, set[str]] = {}
    for table in read_dataset(folder, fraction, folder)[0].values():
        for frame in table.batches():
            for identity, split in zip(frame["prompt_id"], frame["split"], strict=True):
                splits.setdefault(identity, set()).add(split)
    return splits


def test_a_good_data_set_has_no_failures(tmp_path: Path) -> None:
    tables, failures = read_dataset(write(tmp_path, good_tables()), 0.5, tmp_path)
    assert list(tables) == ["demonstrations", "preferences", "prompts", "ratings"]
    assert failures == []
    assert validate(tables) == []
    assert validate(tables, Limits(2, 2), WordCounter()) == []


def test_a_prompt_has_one_split_in_all_files(tmp_path: Path) -> None:
    splits = splits_of(write(tmp_path, good_tables()))
    assert len(splits) == COUNT
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "test"}


def test_added_rows_move_no_old_row(tmp_path: Path) -> None:
    tables = good_tables()
    before = splits_of(write(tmp_path, tables))
    tables["prompts"] = [{"prompt": f"New {i}"} for i in range(50)] + tables["prompts"]
    after = splits_of(write(tmp_path, tables))
    assert len(after) == COUNT + 50
    assert before.items() <= after.items()


def test_a_stated_split_overrides_the_hash_in_all_files(tmp_path: Path) -> None:
    tables = good_tables()
    for i, row in enumerate(tables["preferences"]):
        row["split"] = "test" if i < 3 else "train"
    found, failures = read_dataset(write(tmp_path, tables), 0.5, tmp_path)
    assert failures + validate(found) == []
    for table in found.values():
        assert (table.index["split"] == "test").sum() == 3


def test_contradicting_splits_are_reported_on_the_test_side(tmp_path: Path) -> None:
    tables = good_tables()
    tables["preferences"][4]["split"] = "train"
    tables["prompts"][-5]["split"] = "test"
    found, failures = read_dataset(write(tmp_path, tables), 0.5, tmp_path)
    assert failures == []
    assert validate(found) == [
        Failure(
            "prompts.jsonl",
            COUNT - 4,
            "prompt",
            "prompt is in train and in test (see demonstrations.jsonl row 5)",
            "QUESTION 4?",
        )
    ]


def test_all_failures_come_together(tmp_path: Path) -> None:
    tables = good_tables()
    del tables["demonstrations"]
    tables["preferences"][1]["chosen"] = " "
    tables["preferences"][2] = {"prompt": 7, "chosen": "a\x1b[31m", "rejected": "No"}
    tables["prompts"][0]["prompt"] += " and so on"
    tables["ratings"][3]["response"] = "Well yes"
    folder = write(tmp_path, tables)
    with (folder / "prompts.jsonl").open("a") as file:
        file.write("{oops\n")
    found, failures = read_dataset(folder, 0.5, tmp_path)
    failures = sorted(failures + validate(found, Limits(2, 2), WordCounter()))
    assert [(f.file, f.row, f.field, f.reason.partition(" (")[0], f.value) for f in failures] == [
        (
            "demonstrations",
            None,
            None,
            "missing file, expected demonstrations.jsonl or demonstrations.parquet"
            " or demonstrations.csv",
            "",
        ),
        ("preferences.jsonl", 2, "chosen", "blank text", " "),
        ("preferences.jsonl", 3, "chosen", "control character", r"a\x1b[31m"),
        ("preferences.jsonl", 3, "prompt", "expected text or chat messages, got int", "7"),
        (
            "prompts.jsonl",
            1,
            "prompt",
            "prompt has 5 tokens, the limit is 2",
            f"QUESTION {COUNT - 1}? and so on",
        ),
        ("prompts.jsonl", COUNT + 1, None, "malformed JSON", "{oops"),
        ("ratings.jsonl", 4, "response", "response has 3 tokens, the limit is 2", "Well yes"),
    ]


class PickyCounter(WordCounter):
    """Refuses system prompts, as many chat templates do."""

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        if any(turn["role"] == "system" for prompt in prompts for turn in conversation(prompt)):
            raise DataError("the chat template refuses this prompt (no system role)")
        return super().prompt_lengths(prompts)


def test_prompts_that_the_template_refuses_are_reported_by_row(tmp_path: Path) -> None:
    tables = good_tables()
    system = {"role": "system", "content": "Be brief."}
    for table, row in (("preferences", 2), ("prompts", 5), ("prompts", 7)):
        prompt = f"{table} {row}"
        tables[table][row]["prompt"] = [system, {"role": "user", "content": prompt}]
    tables["ratings"][3]["prompt"] += " and so on"
    tables["ratings"][4]["prompt"] = None
    found, failures = read_dataset(write(tmp_path, tables), 0.5, tmp_path)
    failures += validate(found, Limits(2, 2), PickyCounter())
    refused = "the chat template refuses this prompt (no system role)"
    assert [(f.file, f.row, f.field, f.reason, f.value) for f in failures] == [
        ("ratings.jsonl", 5, "prompt", "missing value", ""),
        ("preferences.jsonl", 3, "prompt", refused, "Be brief.\\npreferences 2"),
        ("prompts.jsonl", 6, "prompt", refused, "Be brief.\\nprompts 5"),
        ("prompts.jsonl", 8, "prompt", refused, "Be brief.\\nprompts 7"),
        (
            "ratings.jsonl",
            4,
            "prompt",
            "prompt has 5 tokens, the limit is 2",
            "Question 3? and so on",
        ),
    ]


def test_an_empty_split_names_the_table(tmp_path: Path) -> None:
    tables = good_tables()
    tables["prompts"] = tables["prompts"][:1]
    found, failures = read_dataset(write(tmp_path, tables), 1e-9, tmp_path)
    assert [(f.file, f.row, f.reason.partition(";")[0]) for f in failures] == [
        ("demonstrations.jsonl", None, "demonstrations has no test rows"),
        ("preferences.jsonl", None, "preferences has no test rows"),
        ("prompts.jsonl", None, "prompts has no test rows"),
    ]
    assert empty_splits(found) == failures


def test_two_files_for_one_table_join_the_report(tmp_path: Path) -> None:
    (write(tmp_path, good_tables()) / "prompts.csv").write_text("prompt\nA\n")
    found, [failure] = read_dataset(tmp_path, 0.5, tmp_path)
    assert "prompts" not in found
    assert (failure.file, failure.row) == ("prompts", None)
    assert "prompts.jsonl and prompts.csv" in failure.reason


def test_a_folder_without_any_table(tmp_path: Path) -> None:
    tables, failures = read_dataset(tmp_path, 0.5, tmp_path)
    assert [failure.file for failure in failures] == ["demonstrations", "preferences", "prompts"]
    assert validate(tables) == []
    with pytest.raises(DataError, match="no data set at"):
        read_dataset(tmp_path / "nowhere", 0.5, tmp_path)


def test_limits_need_a_counter() -> None:
    with pytest.raises(TypeError, match="both limits and counter"):
        validate({}, Limits(1, 1))


def test_the_report_says_where_what_and_how_many_more() -> None:
    failures = [Failure("b.csv", row, "chosen", "blank text") for row in range(1, 4)]
    failures.append(Failure("a.jsonl", None, "label", "missing column"))
    failures.append(Failure("b.csv", 1, None, "row is not an object", "[1]"))
    assert format_report(failures, limit=3).splitlines() == [
        "5 failures in 2 files: a.jsonl 1, b.csv 4",
        "a.jsonl label: missing column",
        "b.csv:1: row is not an object [[1]]",
        "b.csv:1 chosen: blank text",
        "… and 2 more",
    ]
    assert format_report(failures[:1]).startswith("1 failure in 1 file: b.csv 1\n")
    assert format_report([]) == "no failures"


def test_failures_as_a_table() -> None:
    assert failures_table([Failure("b.csv", 1, "chosen", "blank text", " ")]) == [
        {"file": "b.csv", "row": 1, "field": "chosen", "reason": "blank text", "value": " "}
    ]


def test_the_error_says_what_to_do() -> None:
    row = Failure("b.csv", 1, "chosen", "blank text")
    whole = Failure("b.csv", None, "label", "missing column")
    assert "or set data.on_invalid=quarantine" in str(InvalidData([row]))
    assert "cannot be set aside" in str(InvalidData([row, whole]))
    assert InvalidData([row]).failures == [row]


def test_two_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = good_tables()
    tables["demonstrations"][7]["response"] = "one two three four"
    tables["demonstrations"][8]["response"] = " "
    tables["preferences"][30]["rejected"] = "Yes"
    tables["preferences"][31]["prompt"] = "a\x07b"
    tables["preferences"][33] = tables["preferences"][2]
    tables["ratings"][39]["response"] = "also much too long"
    monkeypatch.setattr(formats, "BATCH_ROWS", 5)
    read, failures = read_dataset(write(tmp_path, tables), 0.5, tmp_path)
    assert failures == []
    assert sum(table.batch_count() for table in read.values()) >= 2 * WORTH_IT

    found = {}
    for cores in (1, 2):
        monkeypatch.setattr(second_process, "_cores", lambda cores=cores: cores)
        found[cores] = validate(read, Limits(3, 3), WordCounter())

    assert found[1] == found[2]
    assert {(Path(f.file).stem, f.row, f.field) for f in found[1]} >= {
        ("demonstrations", 8, "response"),
        ("demonstrations", 9, "response"),
        ("preferences", 31, "chosen"),
        ("preferences", 32, "prompt"),
        ("preferences", 34, "prompt"),
        ("ratings", 40, "response"),
    }
