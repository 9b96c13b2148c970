"""Each rule on rows, with the smallest table that keeps it and the smallest that breaks it."""

import json
from typing import Any

import pandas as pd
import pytest

from plumbline.data.findings import digests_of, find, index_of, with_findings
from plumbline.data.formats import DTYPES
from plumbline.data.schemas import broken_rules, schema_of
from plumbline.data.splits import with_prompt_ids


def user(text: str, *earlier: dict[str, str]) -> str:
    return json.dumps([*earlier, {"role": "user", "content": text}], ensure_ascii=False)


def frame(table: str, *rows: dict[str, Any]) -> pd.DataFrame:
    """Canonical rows 1, 2, …, in train unless they say otherwise."""
    filled = [
        {"prompt": user("P"), "split": "train"} | row | {"row": number}
        for number, row in enumerate(rows, start=1)
    ]
    columns = pd.DataFrame(filled)
    types = {name: DTYPES.get(name, "str") for name in columns if name != "row"}
    return with_prompt_ids(columns.astype(types))


def all_with_findings(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Whole tables with their findings; each row a batch of its own."""
    digests = {
        table: [digests_of(rows.iloc[i : i + 1], table) for i in range(len(rows))]
        for table, rows in tables.items()
    }
    indexes = {
        table: index.assign(file=f"{table}.jsonl")
        for table, index in index_of(digests, 0.5).items()
    }
    found = find(indexes)
    return {table: with_findings(rows, found[table]) for table, rows in tables.items()}


def broken(table: str, *rows: dict[str, Any], **limits: int) -> list[tuple[int, str, str]]:
    found = all_with_findings({table: frame(table, *rows)})[table]
    cases = broken_rules(found, schema_of(table, **limits))
    return sorted((index + 1, field, reason) for index, field, reason in cases.values.tolist())


def pair(chosen: str, rejected: str, prompt: str = "P", **more: Any) -> dict[str, Any]:
    return {"prompt": user(prompt), "chosen": chosen, "rejected": rejected, **more}


def test_good_rows_break_nothing() -> None:
    assert broken("prompts", {"prompt": user("A")}, {"prompt": user("B\n\tC")}) == []
    assert broken("preferences", pair("A", "B"), pair("A", "C"), pair("A", "B", "Q")) == []
    rated = {"response": "A", "label": True}
    # Two raters who disagree are two ratings.
    assert broken("ratings", rated, {**rated, "label": False}) == []


@pytest.mark.parametrize("text", ["", "  ", "\n\t", "\u00a0\u2003"])
def test_blank_text(text: str) -> None:
    assert broken("demonstrations", {"response": text}) == [(1, "response", "blank text")]
    assert broken("prompts", {"prompt": user(text)}) == [(1, "prompt", "blank text")]


def test_a_blank_message_anywhere_in_the_prompt() -> None:
    earlier = {"role": "system", "content": " "}
    assert broken("prompts", {"prompt": user("A", earlier)}) == [(1, "prompt", "blank text")]


@pytest.mark.parametrize("char", ["\x00", "\x08", "\x0b", "\r", "\x1b", "\x7f", "\x85", "\x9f"])
def test_control_characters(char: str) -> None:
    text = f"a{char}b"
    assert broken("demonstrations", {"response": text}) == [(1, "response", "control character")]
    assert broken("prompts", {"prompt": user(text)}) == [(1, "prompt", "control character")]


@pytest.mark.parametrize("text", ["\n", "\t", "\u00a0", "é", "👩‍💻", r"\u001b", r"\b"])
def test_what_is_no_control_character(text: str) -> None:
    assert broken("demonstrations", {"response": f"a{text}b"}) == []
    assert broken("prompts", {"prompt": user(f"a{text}b")}) == []


def test_chosen_equals_rejected() -> None:
    assert broken("preferences", pair("A", "B"), pair("A ", "\nA")) == [
        (2, "chosen", "chosen equals rejected")
    ]


def test_the_same_pair_in_both_orders_is_reported_on_the_later_rows() -> None:
    reason = "same pair in both orders (see row {})".format
    rows = [pair("B", "A"), pair("A", "B", "Q"), pair("A", "B "), pair("C", "A"), pair("A", "C")]
    assert broken("preferences", *rows) == [(3, "chosen", reason(1)), (5, "chosen", reason(4))]


def test_both_orders_and_a_duplicate() -> None:
    found = broken("preferences", pair("A", "B"), pair("B", "A"), pair("A", "B"))
    assert found == [
        (2, "chosen", "same pair in both orders (see row 1)"),
        (3, "chosen", "same pair in both orders (see row 2)"),
        (3, "prompt", "duplicate of row 1"),
    ]


def test_later_duplicates_are_reported() -> None:
    one, other = {"response": "A"}, {"response": "B"}
    assert broken("demonstrations", one, other, {"response": "A "}, one) == [
        (3, "prompt", "duplicate of row 1"),
        (4, "prompt", "duplicate of row 1"),
    ]
    assert broken("prompts", {}, {"prompt": user("Q")}, {}) == [(3, "prompt", "duplicate of row 1")]
    # A margin does not make it another pair.
    rows = [pair("A", "B", margin=0.0), pair("A", "B", margin=1.0)]
    assert broken("preferences", *rows) == [(2, "prompt", "duplicate of row 1")]


@pytest.mark.parametrize("margin", [-0.5, float("inf")])
def test_margin_out_of_range(margin: float) -> None:
    rows = [pair("A", "B", margin=0.0), pair("A", "C", margin=margin)]
    assert broken("preferences", *rows) == [(2, "margin", "expected a finite margin of at least 0")]


def test_null_fields_are_left_to_the_reader() -> None:
    nothing = {"prompt": None, "chosen": None, "rejected": None}
    assert broken("preferences", nothing, nothing, pair("A", "B")) == []
    assert broken("ratings", *[{"response": "A", "label": None}] * 2) == []


def test_a_prompt_across_splits_is_reported_on_the_test_side() -> None:
    preferences = frame(
        "preferences", pair("A", "B", "Q"), pair("A", "B"), pair("A", "C", split="test")
    )
    prompts = frame("prompts", {"split": "test"}, {"prompt": user("R"), "split": "test"})
    found = all_with_findings({"preferences": preferences, "prompts": prompts})
    reason = "prompt is in train and in test (see preferences.jsonl row 2)"
    for table, index in (("preferences", 2), ("prompts", 0)):
        cases = broken_rules(found[table], schema_of(table))
        assert cases.values.tolist() == [[index, "prompt", reason]]


def test_lengths_at_and_over_the_limit() -> None:
    rows = frame("preferences", pair("A", "B"), pair("C", "D", "Q"))
    lengths = {"prompt_tokens": [64, 70], "chosen_tokens": [9, 8], "rejected_tokens": [8, 10]}
    rows = all_with_findings({"preferences": rows})["preferences"].assign(
        **{name: pd.array(values, dtype="Int64") for name, values in lengths.items()}
    )
    cases = broken_rules(rows, schema_of("preferences", 64, 8))
    assert sorted(cases.values.tolist()) == [
        [0, "chosen", "chosen has 9 tokens, the limit is 8"],
        [1, "prompt", "prompt has 70 tokens, the limit is 64"],
        [1, "rejected", "rejected has 10 tokens, the limit is 8"],
    ]


def test_a_frame_that_is_not_canonical_is_a_bug_not_bad_data() -> None:
    with pytest.raises(TypeError, match="expected canonical rows"):
        broken_rules(pd.DataFrame({"row": [1]}), schema_of("prompts"))
