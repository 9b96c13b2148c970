"""What is written for the training steps, what is set aside, and when nothing is written."""

import json
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import pytest

from plumbline.data.prepare import Prepared, prepare
from plumbline.data.validation import InvalidData
from plumbline.errors import MachineError

COUNT = 30


def good_tables() -> dict[str, list[dict[str, Any]]]:
    prompts = [f"Question {i}?" for i in range(COUNT)]
    return {
        "demonstrations": [{"prompt": p, "response": "Yes", "source": "x"} for p in prompts],
        "preferences": [
            {"prompt": p, "chosen": "Yes", "rejected": "No", "clean": i % 5 != 0}
            for i, p in enumerate(prompts)
        ],
        "prompts": [{"prompt": p} for p in prompts],
    }


def write(folder: Path, tables: dict[str, list[dict[str, Any]]]) -> Path:
    folder.mkdir(exist_ok=True)
    for table, rows in tables.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{table}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def run(
    tmp_path: Path,
    tables: dict[str, list[dict[str, Any]]],
    on_invalid: Literal["fail", "quarantine"] = "fail",
) -> Prepared:
    folder = write(tmp_path / "data", tables)
    return prepare(folder, tmp_path / "out", test_fraction=0.3, on_invalid=on_invalid)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_every_row_is_written_once_and_counted(tmp_path: Path) -> None:
    prepared = run(tmp_path, good_tables())
    assert (prepared.failures, prepared.quarantined) == ([], 0)
    names = [f"{t}/{s}" for t in good_tables() for s in ("train", "test")]
    assert list(prepared.rows) == names
    assert set(files(tmp_path / "out")) == {f"{name}.parquet" for name in names} | {"failures.json"}
    for name, count in prepared.rows.items():
        assert 0 < count < COUNT
        assert pq.read_metadata(tmp_path / "out" / f"{name}.parquet").num_rows == count
    assert prepared.rows["prompts/train"] + prepared.rows["prompts/test"] == COUNT


def test_only_the_needed_columns_in_file_order(tmp_path: Path) -> None:
    run(tmp_path, good_tables())
    tables = {t: pq.read_table(tmp_path / "out" / t / "train.parquet") for t in good_tables()}
    assert tables["demonstrations"].column_names == ["prompt", "response", "prompt_id"]
    assert tables["preferences"].column_names == [
        "prompt",
        "chosen",
        "rejected",
        "clean",
        "prompt_id",
    ]
    assert tables["prompts"].column_names == ["prompt", "prompt_id"]
    assert {str(field.type) for field in tables["preferences"].schema} == {"string", "bool"}
    numbers = [int(prompt.split()[1][:-4]) for prompt in tables["prompts"]["prompt"].to_pylist()]
    assert numbers == sorted(numbers)
    assert tables["prompts"].schema.metadata is None


def test_optional_columns_are_carried(tmp_path: Path) -> None:
    tables = good_tables()
    for row in tables["preferences"]:
        row["margin"] = 0.5
    tables["ratings"] = [{**row, "label": 1} for row in tables["demonstrations"]]
    prepared = run(tmp_path, tables)
    preferences = pq.read_table(tmp_path / "out/preferences/test.parquet")
    assert set(preferences["margin"].to_pylist()) == {0.5}
    ratings = pq.read_table(tmp_path / "out/ratings/test.parquet")
    assert ratings.column_names == ["prompt", "response", "label", "prompt_id"]
    assert ratings["label"].to_pylist() == [True] * prepared.rows["ratings/test"]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path, good_tables())
    before = files(tmp_path / "out")
    run(tmp_path, good_tables())
    assert files(tmp_path / "out") == before
    # One changed table leaves the bytes of the others as they were.
    tables = good_tables()
    tables["prompts"].append({"prompt": "One more?"})
    run(tmp_path, tables)
    changed = {name for name, content in files(tmp_path / "out").items() if content != before[name]}
    assert changed < {"prompts/train.parquet", "prompts/test.parquet"}
    assert len(changed) == 1


def test_an_earlier_result_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "out" / "old").mkdir(parents=True)
    run(tmp_path, good_tables())
    assert not (tmp_path / "out" / "old").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out"}


def test_fail_raises_with_every_failure_and_writes_nothing(tmp_path: Path) -> None:
    tables = good_tables()
    tables["preferences"][1]["chosen"] = ""
    tables["prompts"][2]["prompt"] = None
    with pytest.raises(InvalidData) as caught:
        run(tmp_path, tables)
    assert [(failure.file, failure.row) for failure in caught.value.failures] == [
        ("preferences.jsonl", 2),
        ("prompts.jsonl", 3),
    ]
    assert "data.on_invalid=quarantine" in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_quarantine_sets_bad_rows_aside_with_their_reasons(tmp_path: Path) -> None:
    tables = good_tables()
    tables["preferences"][1] |= {"chosen": "", "rejected": "a\x07"}
    tables["preferences"][2] |= {"clean": "maybe"}
    tables["prompts"].append({"prompt": "Question 3?"})
    write(tmp_path / "data", tables)
    with (tmp_path / "data" / "demonstrations.jsonl").open("a") as file:
        file.write("{oops\n")
    prepared = prepare(
        tmp_path / "data", tmp_path / "out", test_fraction=0.3, on_invalid="quarantine"
    )
    assert prepared.quarantined == 4
    assert len(prepared.failures) == 5
    assert prepared.rows["preferences/train"] + prepared.rows["preferences/test"] == COUNT - 2
    assert prepared.rows["prompts/train"] + prepared.rows["prompts/test"] == COUNT

    quarantine = tmp_path / "out" / "quarantine"
    read = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in quarantine.iterdir()
    }
    prompt = '[{"role":"user","content":"Question %d?"}]'
    assert read["preferences"] == [
        {
            "row": 2,
            "reasons": ["chosen: blank text", "rejected: control character"],
            "prompt": prompt % 1,
            "chosen": "",
            "rejected": "a\x07",
            "clean": True,
        },
        {
            "row": 3,
            "reasons": ["clean: expected true, false, 1 or 0"],
            "prompt": prompt % 2,
            "chosen": "Yes",
            "rejected": "No",
            "clean": None,
        },
    ]
    assert read["prompts"] == [
        {"row": COUNT + 1, "reasons": ["prompt: duplicate of row 4"], "prompt": prompt % 3}
    ]
    [unread] = read["demonstrations"]
    assert (unread["row"], unread["prompt"]) == (COUNT + 1, None)
    report = json.loads((tmp_path / "out" / "failures.json").read_text())
    assert [row["file"] for row in report] == [f.file for f in prepared.failures]


def test_quarantine_leaves_no_prompt_in_both_splits(tmp_path: Path) -> None:
    tables = good_tables()
    tables["preferences"][0]["split"] = "train"
    tables["prompts"][0]["split"] = "test"
    prepared = run(tmp_path, tables, "quarantine")
    assert prepared.quarantined == 1
    ids = {
        split: {
            identity
            for table in good_tables()
            for identity in pq.read_table(tmp_path / "out" / table / f"{split}.parquet")[
                "prompt_id"
            ].to_pylist()
        }
        for split in ("train", "test")
    }
    assert not ids["train"] & ids["test"]


@pytest.mark.parametrize("fault", ["missing file", "empty file", "missing column"])
def test_a_fault_that_no_row_carries_always_raises(tmp_path: Path, fault: str) -> None:
    tables = good_tables()
    if fault == "missing file":
        del tables["prompts"]
    elif fault == "empty file":
        tables["prompts"] = []
    else:
        tables["prompts"] = [{"query": "A"}]
    with pytest.raises(InvalidData, match=f"(?s){fault}.*cannot be set aside"):
        run(tmp_path, tables, "quarantine")
    assert not (tmp_path / "out").exists()


def test_a_split_that_quarantine_empties_raises(tmp_path: Path) -> None:
    tables = good_tables()
    tables["prompts"] = [{"prompt": "A", "split": "train"}, {"prompt": " ", "split": "test"}]
    with pytest.raises(InvalidData, match="prompts has no test rows"):
        run(tmp_path, tables, "quarantine")
    # A table of which no row could be read has no rows either.
    (tmp_path / "data" / "prompts.jsonl").write_text("{oops\n")
    with pytest.raises(InvalidData, match="prompts has no train rows"):
        prepare(tmp_path / "data", tmp_path / "out", test_fraction=0.3, on_invalid="quarantine")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_earlier_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, good_tables())
    before = files(tmp_path / "out")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(MachineError, match="No space left on device"):
        run(tmp_path, good_tables())
    assert files(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out"}


def test_an_output_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = write(tmp_path / "data", good_tables())
    with pytest.raises(MachineError, match="cannot be written"):
        prepare(folder, tmp_path / "file" / "out", test_fraction=0.3, on_invalid="fail")
