"""What the readers accept, the canonical rows they give, and each fault they report."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plumbline.data.formats import Failure, canonical_frame, find_table, read_batches
from plumbline.data.values import CONVERTERS, ROLES, Fault, conversation, excerpt
from plumbline.errors import DataError

HELLO = '[{"role":"user","content":"Hello"}]'


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reasons(failures: list[Failure]) -> list[tuple[int | None, str | None, str]]:
    return [(failure.row, failure.field, failure.reason) for failure in failures]


def read_table(path: Path, table: str) -> tuple[pd.DataFrame, list[Failure]]:
    """All batches of a file in one frame; a fault of the file is its only failure."""
    frames, failures = [], []
    try:
        for frame, found in read_batches(path, table):
            frames.append(frame)
            failures += found
    except Fault as fault:
        return canonical_frame([], table, set()), [Failure(path.name, None, None, str(fault))]
    return pd.concat(frames, ignore_index=True), failures


def read_rows(tmp_path: Path, table: str, *rows: Any) -> tuple[pd.DataFrame, list[Failure]]:
    return read_table(write_jsonl(tmp_path / f"{table}.jsonl", list(rows)), table)


def test_text_becomes_one_user_turn(tmp_path: Path) -> None:
    frame, failures = read_rows(tmp_path, "demonstrations", {"prompt": "Hello", "response": "Hi"})
    assert failures == []
    assert frame["prompt"].tolist() == [HELLO]
    assert frame["response"].tolist() == ["Hi"]
    assert conversation(HELLO) == [{"role": "user", "content": "Hello"}]


@given(st.lists(st.tuples(st.sampled_from(ROLES), st.text()), max_size=3), st.text())
def test_a_canonical_prompt_is_compact_json(before: list[tuple[str, str]], last: str) -> None:
    turns = [{"role": role, "content": content} for role, content in [*before, ("user", last)]]

    canonical = CONVERTERS["prompt"](turns)

    assert canonical == json.dumps(turns, ensure_ascii=False, separators=(",", ":"))


def test_chat_and_text_give_the_same_row(tmp_path: Path) -> None:
    # Keys in another order and one key too many, as other tools write them.
    user = {"content": "Hello", "role": "user", "name": None}
    assistant = {"role": "assistant", "content": "Hi"}
    frame, failures = read_rows(
        tmp_path,
        "demonstrations",
        {"prompt": "Hello", "response": "Hi"},
        {"prompt": [user], "response": [assistant]},
        {"messages": [user, assistant]},
    )
    assert failures == []
    assert frame[["prompt", "response"]].drop_duplicates().values.tolist() == [[HELLO, "Hi"]]


def test_messages_keep_all_turns_before_the_last(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "Zürich?"},
        {"role": "assistant", "content": "D"},
    ]
    frame, failures = read_rows(tmp_path, "demonstrations", {"messages": turns})
    assert failures == []
    assert conversation(frame["prompt"][0]) == turns[:-1]
    assert "Zürich" in frame["prompt"][0]
    assert frame["response"][0] == "D"


def test_the_three_formats_give_the_same_rows(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Short."}, {"role": "user", "content": 'A "b"\n, c'}]
    answer = [{"role": "assistant", "content": "Yes, ü"}]
    rows: list[dict[str, Any]] = [
        {"prompt": chat, "chosen": answer, "rejected": [{**answer[0], "content": "No"}]},
        {"prompt": [chat[1]], "chosen": [{**answer[0], "content": "Three"}], "rejected": answer},
    ]
    extra: list[dict[str, Any]] = [
        {"margin": 0.5, "clean": True, "split": "train", "source": "x"},
        {"margin": None, "clean": False, "split": None, "source": "y"},
    ]
    rows = [row | more for row, more in zip(rows, extra, strict=True)]
    write_jsonl(tmp_path / "preferences.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "preferences.parquet")
    cells = [
        {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
        for row in rows
    ]
    pd.DataFrame(cells).to_csv(tmp_path / "preferences.csv", index=False)

    frames = []
    for suffix in ("jsonl", "parquet", "csv"):
        frame, failures = read_table(tmp_path / f"preferences.{suffix}", "preferences")
        assert failures == []
        frames.append(frame)
    columns = ["row", "prompt", "chosen", "rejected", "margin", "clean", "split"]
    assert list(frames[0]) == columns
    assert frames[0]["margin"].tolist() == [0.5, 0.0]
    assert frames[0]["clean"].tolist() == [True, False]
    assert frames[0]["split"].isna().tolist() == [False, True]
    assert conversation(frames[0]["prompt"][0]) == chat
    pd.testing.assert_frame_equal(frames[0], frames[1])
    pd.testing.assert_frame_equal(frames[0], frames[2])


def test_labels_are_bools_in_every_spelling(tmp_path: Path) -> None:
    rated = {"prompt": "P", "response": "R"}
    frame, failures = read_rows(
        tmp_path, "ratings", *[{**rated, "label": label} for label in (True, False, 1, 0)]
    )
    assert failures == []
    assert frame["label"].tolist() == [True, False, True, False]
    path = tmp_path / "ratings.csv"
    path.write_text("prompt,response,label\nP,R,true\nP,R,False\nP,R,1\nP,R,0\nP,R,yes\nP,R,\n")
    frame, failures = read_table(path, "ratings")
    assert frame["label"].tolist()[:4] == [True, False, True, False]
    assert reasons(failures) == [
        (5, "label", "expected true, false, 1 or 0"),
        (6, "label", "missing value"),
    ]


def test_rows_count_blank_lines_in_jsonl_only(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "A"}\n\n{"prompt": "B\u2028C"}\r\n', encoding="utf-8")
    frame, failures = read_table(path, "prompts")
    assert (frame["row"].tolist(), failures) == ([1, 3], [])
    path = tmp_path / "prompts.csv"
    path.write_text('prompt,more\n"A\nA",x\nB,y\n')
    frame, failures = read_table(path, "prompts")
    assert (frame["row"].tolist(), failures) == ([1, 2], [])


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "Hello"}')
    (tmp_path / "prompts.csv").write_bytes(b"\xef\xbb\xbfprompt\nHello\n")
    for name in ("prompts.jsonl", "prompts.csv"):
        frame, failures = read_table(tmp_path / name, "prompts")
        assert (frame["prompt"].tolist(), failures) == ([HELLO], [])


def test_two_files_for_a_table_are_refused(tmp_path: Path) -> None:
    assert find_table(tmp_path, "prompts") is None
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "A"}])
    assert find_table(tmp_path, "prompts") == path
    (tmp_path / "prompts.csv").write_text("prompt\nA\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl and prompts\.csv"):
        find_table(tmp_path, "prompts")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_missing_and_an_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"prompts.{suffix}"
    assert reasons(read_table(path, "prompts")[1]) == [(None, None, "missing file")]
    path.write_bytes(b"")
    frame, failures = read_table(path, "prompts")
    assert reasons(failures) == [(None, None, "empty file")]
    assert list(frame) == ["row", "prompt", "split"]
    assert frame.empty


def test_a_file_without_rows_is_empty(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n \n")
    (tmp_path / "prompts.csv").write_text("prompt\n")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "prompts.parquet")
    for suffix in ("jsonl", "csv", "parquet"):
        failures = read_table(tmp_path / f"prompts.{suffix}", "prompts")[1]
        assert reasons(failures) == [(None, None, "empty file")]


def test_a_jsonl_fault_does_not_hide_the_other_rows(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [b'{"prompt": "A"}', b'{"prompt": "B"', b"[1]", b'{"prompt": "\xff"}', b'{"prompt": 3}']
    path.write_bytes(b"\n".join([*lines, b'{"prompt": "C"}']))
    frame, failures = read_table(path, "prompts")
    assert frame["row"].tolist() == [1, 5, 6]
    assert frame["prompt"].isna().tolist() == [False, True, False]
    assert reasons(failures) == [
        (2, None, "malformed JSON (Expecting ',' delimiter at character 15)"),
        (3, None, "row is not an object"),
        (4, None, "not UTF-8 (byte 47)"),
        (5, "prompt", "expected text or chat messages, got int"),
    ]
    assert path.read_bytes()[47] == 0xFF


def test_a_csv_fault_does_not_hide_the_other_rows(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_bytes("prompt,more\nä,x\nB\n".encode() + b"C\xe4\xe5,y\nD,z\n")
    frame, failures = read_table(path, "prompts")
    assert frame["row"].tolist() == [1, 4]
    assert reasons(failures) == [
        (2, None, "expected 2 cells, got 1"),
        (3, None, "not UTF-8 (byte 20)"),
    ]
    assert path.read_bytes()[20] == 0xE4


def test_malformed_csv(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('prompt\nA\n"B')
    frame, failures = read_table(path, "prompts")
    assert frame["row"].tolist() == [1]
    assert reasons(failures) == [(2, None, "malformed csv (unexpected end of data)")]
    path.write_text("prompt,prompt\nA,B\n")
    assert "more than once" in read_table(path, "prompts")[1][0].reason


def test_unreadable_parquet(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    path.write_bytes(b"PAR1 not really")
    [failure] = read_table(path, "prompts")[1]
    assert failure.row is None
    assert failure.reason.startswith("unreadable parquet: ")


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    data = pa.array([b"A", b"B\xff", b"C"], pa.binary())
    text = pa.StringArray.from_buffers(3, *data.buffers()[1:])
    pq.write_table(pa.table({"prompt": text}), path)
    frame, failures = read_table(path, "prompts")
    assert frame["row"].tolist() == [1, 3]
    assert reasons(failures) == [(2, None, "not UTF-8 (byte 1)")]


def test_a_missing_column_is_said_once(tmp_path: Path) -> None:
    rows = [{"prompt": "A", "choosen": "B", "rejected": "C"}] * 3
    frame, failures = read_rows(tmp_path, "preferences", *rows)
    assert reasons(failures) == [(None, "chosen", "missing column")]
    assert frame["chosen"].isna().all()
    [failure] = read_rows(tmp_path, "demonstrations", {"prompt": "A"})[1]
    assert (failure.field, failure.reason) == ("response", "missing column")


def test_a_missing_value_is_said_by_row(tmp_path: Path) -> None:
    rows = [{"prompt": "A", "response": "B"}, {"prompt": "A"}, {"prompt": None, "response": "B"}]
    _, failures = read_rows(tmp_path, "demonstrations", *rows)
    assert reasons(failures) == [(2, "response", "missing value"), (3, "prompt", "missing value")]


SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "U"}
ASSISTANT = {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([USER, ASSISTANT], "last turn is not the user's"),
        ([], "expected text or chat messages, got an empty list"),
        ({"role": "user"}, "expected text or chat messages, got dict"),
        (["U"], 'expected each message to be {"role": …, "content": …}'),
        ([{"role": "user"}], 'expected each message to be {"role": …, "content": …}'),
        ([{"role": "human", "content": "U"}], "unknown role 'human', expected system, user"),
        ([{"role": "user", "content": None}], "expected the content of a message to be text, got"),
        ("\ud800", "not valid Unicode (a lone surrogate)"),
    ],
)
def test_faults_of_a_prompt(tmp_path: Path, prompt: Any, reason: str) -> None:
    frame, [failure] = read_rows(tmp_path, "prompts", {"prompt": prompt})
    assert (failure.row, failure.field) == (1, "prompt")
    assert failure.reason.startswith(reason)
    assert frame["prompt"].isna().all()


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ([USER], "expected text or one assistant message, got 1 message(s)"),
        ([USER, ASSISTANT], "expected text or one assistant message, got 2 message(s)"),
        (1.5, "expected text or chat messages, got float"),
    ],
)
def test_faults_of_a_response(tmp_path: Path, response: Any, reason: str) -> None:
    row = {"prompt": "P", "response": response, "label": 1}
    _, failures = read_rows(tmp_path, "ratings", row)
    assert reasons(failures) == [(1, "response", reason)]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER], "last turn is not the assistant's"),
        ([ASSISTANT], "no user turn right before the assistant's last turn"),
        ([SYSTEM, ASSISTANT], "no user turn right before the assistant's last turn"),
        ("U", "expected text or chat messages, got str"),
        (None, "missing value"),
    ],
)
def test_faults_of_messages(tmp_path: Path, messages: Any, reason: str) -> None:
    _, failures = read_rows(tmp_path, "demonstrations", {"messages": messages})
    assert reasons(failures) == [(1, "messages", reason)]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("margin", "1", "expected a number, got str"),
        ("margin", True, "expected a number, got bool"),
        ("margin", float("nan"), "expected a number, got NaN"),
        ("clean", "true", "expected true, false, 1 or 0"),
        ("clean", 2, "expected true, false, 1 or 0"),
        ("split", "validation", 'expected "train" or "test"'),
    ],
)
def test_faults_of_optional_columns(tmp_path: Path, field: str, value: Any, reason: str) -> None:
    row = {"prompt": "P", "chosen": "C", "rejected": "R", field: value}
    _, failures = read_rows(tmp_path, "preferences", row)
    assert reasons(failures) == [(1, field, reason)]


def test_malformed_chat_messages_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('prompt,x\n"[{""role"": ""user"",",1\n')
    [failure] = read_table(path, "prompts")[1]
    assert (failure.row, failure.field) == (1, "prompt")
    assert failure.reason.startswith("malformed JSON in chat messages")


def test_failures_sort_by_file_and_row_with_whole_files_first() -> None:
    whole = Failure("a.csv", None, None, "missing column")
    second, tenth = Failure("a.csv", 2, "prompt", "x"), Failure("a.csv", 10, None, "x")
    other = Failure("b.csv", 1, None, "x")
    assert sorted([other, tenth, second, whole]) == [whole, second, tenth, other]


def test_excerpts_are_short_and_show_what_cannot_be_seen() -> None:
    assert excerpt("a\x1b[0m\nb") == r"a\x1b[0m\nb"
    long = "x" * 100 + "\x07" + "y" * 100
    assert excerpt(long) == "x" * 60 + "…"
    assert r"\x07" in excerpt(long, centre=100)
    assert excerpt(None) == ""
