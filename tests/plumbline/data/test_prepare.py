"""What is written for the training steps, what is set aside, and when nothing is written."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import pytest

from plumbline.data.prepare import Prepared, prepare
from plumbline.data.splits import prompt_id, split_of
from plumbline.data.tables import Table
from plumbline.data.validation import InvalidData, Limits, TokenCounter
from plumbline.data.values import conversation
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

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(MachineError, match="No space left on device"):
        run(tmp_path, good_tables())
    assert files(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out"}


def test_an_output_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = write(tmp_path / "data", good_tables())
    with pytest.raises(MachineError, match="cannot be written"):
        prepare(folder, tmp_path / "file" / "out", test_fraction=0.3, on_invalid="fail")


# Prompts over the limit that lose their oldest turns.


class WordCounter:
    """One token a word."""

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        return [
            sum(len(turn["content"].split()) for turn in conversation(prompt)) for prompt in prompts
        ]

    def response_lengths(self, responses: Sequence[str]) -> list[int]:
        return [len(response.split()) for response in responses]


def chat(*contents: str) -> list[dict[str, str]]:
    """A conversation in which user and assistant take turns."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


def run_cut(
    tmp_path: Path,
    tables: dict[str, list[dict[str, Any]]],
    on_invalid: Literal["fail", "quarantine"] = "fail",
    counter_for: Callable[..., TokenCounter] = lambda tables: WordCounter(),
    long_prompts: Literal["refuse", "drop_turns"] = "drop_turns",
) -> Prepared:
    return prepare(
        write(tmp_path / "data", tables),
        tmp_path / "out",
        test_fraction=0.3,
        on_invalid=on_invalid,
        limits=Limits(max_prompt_tokens=4, max_response_tokens=4),
        counter_for=counter_for,
        long_prompts=long_prompts,
    )


def written(tmp_path: Path, table: str) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Of each split, by the text of the last turn: the prompt id and the texts of all turns."""
    found: dict[str, dict[str, tuple[str, list[str]]]] = {}
    for split in ("train", "test"):
        rows = pq.read_table(tmp_path / "out" / table / f"{split}.parquet").to_pylist()
        texts = [[turn["content"] for turn in conversation(row["prompt"])] for row in rows]
        found[split] = {
            text[-1]: (row["prompt_id"], text) for row, text in zip(rows, texts, strict=True)
        }
    return found


def long_tables() -> dict[str, list[dict[str, Any]]]:
    """Every prompt is too long, and fits with its last turn; the same in all tables."""
    tables = good_tables()
    for rows in tables.values():
        for i, row in enumerate(rows):
            row["prompt"] = chat(f"Long first {i}", "I see so", "And then?", "Yes", f"Last {i}")
    return tables


def test_long_prompts_lose_their_oldest_turns(tmp_path: Path) -> None:
    tables = long_tables()
    prepared = run_cut(tmp_path, tables)
    assert prepared.failures == []
    assert prepared.cut == prepared.rows
    assert prepared.merged == prepared.quarantined == 0
    for table in tables:
        texts = [text for split in written(tmp_path, table).values() for _, text in split.values()]
        assert sorted(texts) == sorted([f"Last {i}"] for i in range(COUNT))


def test_the_whole_prompt_decides_the_split_and_keeps_its_id(tmp_path: Path) -> None:
    tables = long_tables()
    run_cut(tmp_path, tables)
    for table in tables:
        for split, rows in written(tmp_path, table).items():
            for last, (identity, _) in rows.items():
                i = int(last.split()[1])
                whole = prompt_id(json.dumps(tables["prompts"][i]["prompt"]))
                assert (identity, split) == (whole, split_of(whole, 0.3))


def test_prompts_that_fit_are_left_alone(tmp_path: Path) -> None:
    tables = good_tables()
    tables["prompts"][0]["prompt"] = chat("Long first one", "I", "Cut")
    prepared = run_cut(tmp_path, tables)
    assert sum(prepared.cut.values()) == 1
    assert prepared.cut["prompts/train"] + prepared.cut["prompts/test"] == 1
    assert prepared.cut.keys() == prepared.rows.keys()
    cut = files(tmp_path / "out")
    tables["prompts"][0]["prompt"] = chat("Cut")
    untouched = run_cut(tmp_path, tables)
    assert sum(untouched.cut.values()) == 0
    assert {n for n, content in files(tmp_path / "out").items() if content != cut[n]} <= {
        "prompts/train.parquet",
        "prompts/test.parquet",
    }


def test_long_prompts_are_refused_by_default(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"prompt has 11 tokens, the limit is 4"):
        run_cut(tmp_path, long_tables(), long_prompts="refuse")
    prepared = run_cut(tmp_path, good_tables(), long_prompts="refuse")
    assert (prepared.cut, prepared.merged) == ({}, 0)


def test_what_does_not_fit_with_its_last_turn_alone_is_reported_whole(tmp_path: Path) -> None:
    tables = good_tables()
    prompt = chat("A", "B", "far too many words for this limit")
    tables["prompts"].append({"prompt": prompt})
    with pytest.raises(InvalidData) as caught:
        run_cut(tmp_path, tables)
    [failure] = caught.value.failures
    assert (failure.row, failure.reason) == (COUNT + 1, "prompt has 9 tokens, the limit is 4")
    prepared = run_cut(tmp_path, tables, "quarantine")
    assert (prepared.quarantined, sum(prepared.cut.values())) == (1, 0)
    [line] = (tmp_path / "out/quarantine/prompts.jsonl").read_text().splitlines()
    assert conversation(json.loads(line)["prompt"]) == prompt


def test_a_row_that_was_cut_and_set_aside_is_kept_whole(tmp_path: Path) -> None:
    tables = long_tables()
    tables["preferences"][2]["chosen"] = " "
    run_cut(tmp_path, tables, "quarantine")
    [line] = (tmp_path / "out/quarantine/preferences.jsonl").read_text().splitlines()
    assert conversation(json.loads(line)["prompt"]) == tables["preferences"][2]["prompt"]


def test_rows_that_only_the_cut_makes_the_same_are_merged(tmp_path: Path) -> None:
    tables = good_tables()
    tables["prompts"] += [
        {"prompt": chat("One long beginning", "Yes", "Go on"), "split": "train"},
        {"prompt": chat("Two long beginnings", "Yes", "Go on"), "split": "train"},
        {"prompt": chat("Go on"), "split": "train"},
    ]
    tables["preferences"] += [
        {"prompt": chat("One long beginning", "Yes", "Go on"), "chosen": "A", "rejected": "B"},
        {"prompt": chat("Two long beginnings", "Yes", "Go on"), "chosen": "B", "rejected": "A"},
        {"prompt": chat("Two long beginnings", "Yes", "Go on"), "chosen": "A", "rejected": "C"},
    ]
    prepared = run_cut(tmp_path, tables)
    assert prepared.failures == []
    # Of the prompts two, and of the preferences the pair that says the opposite.
    assert prepared.merged == 3
    assert prepared.rows["prompts/train"] + prepared.rows["prompts/test"] == COUNT + 1
    assert prepared.rows["preferences/train"] + prepared.rows["preferences/test"] == COUNT + 2


def test_no_prompt_is_in_train_and_in_test_once_cut(tmp_path: Path) -> None:
    tables = good_tables()
    for split in ("test", "train"):
        tables["preferences"] += [
            {
                "prompt": chat(f"A {split} beginning", "Yes", f"go on {end}"),
                "chosen": "A",
                "rejected": "B",
                "split": split,
            }
            for end in ("a", "b")
        ]
    tables["prompts"].append({"prompt": "GO  ON a", "split": "train"})
    prepared = run_cut(tmp_path, tables)
    assert (prepared.failures, prepared.merged) == ([], 2)
    ids = {
        split: {
            prompt_id(prompt)
            for table in tables
            for prompt in pq.read_table(tmp_path / "out" / table / f"{split}.parquet")[
                "prompt"
            ].to_pylist()
        }
        for split in ("train", "test")
    }
    assert not ids["train"] & ids["test"]


def test_duplicates_before_the_cut_are_reported_as_ever(tmp_path: Path) -> None:
    tables = long_tables()
    tables["prompts"].append(dict(tables["prompts"][3]))
    with pytest.raises(InvalidData, match=r"duplicate of row 4"):
        run_cut(tmp_path, tables)


def test_a_tokenizer_that_the_cut_rows_train_counts_them(tmp_path: Path) -> None:
    class Trained(WordCounter):
        """A word that the demonstrations hold is one token, any other is three."""

        def __init__(self, tables: Mapping[str, Table]) -> None:
            self.known = {
                word
                for frame in tables["demonstrations"].batches()
                for prompt in frame["prompt"]
                for turn in conversation(prompt)
                for word in turn["content"].split()
            }

        def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
            return [
                sum(
                    1 if word in self.known else 3
                    for turn in conversation(prompt)
                    for word in turn["content"].split()
                )
                for prompt in prompts
            ]

    tables = good_tables()
    for row in tables["demonstrations"]:
        row["prompt"] = chat("rare words far gone", "Yes", row["prompt"])
    # It fits only as long as the demonstrations still hold "rare words".
    tables["prompts"].append({"prompt": chat("rare words", "x", "?")})
    tables["demonstrations"][0]["prompt"] = chat("rare words x ? so", "Yes", "x ?")
    prepared = run_cut(tmp_path, tables, counter_for=Trained)
    assert prepared.failures == []
    last = {key for split in written(tmp_path, "prompts").values() for key in split}
    assert "?" in last
    assert prepared.cut["prompts/train"] + prepared.cut["prompts/test"] == 1


def test_turns_can_only_be_dropped_where_they_are_counted(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="limits and counter_for"):
        prepare(
            write(tmp_path / "data", good_tables()), tmp_path / "out", test_fraction=0.3,
            on_invalid="fail", long_prompts="drop_turns",
        )  # fmt: skip


def test_a_file_that_is_missing_is_reported_though_nothing_can_be_cut(tmp_path: Path) -> None:
    tables = long_tables()
    del tables["prompts"]
    with pytest.raises(InvalidData, match="missing file"):
        run_cut(tmp_path, tables)
