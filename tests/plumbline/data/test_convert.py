"""Public formats to our rows, and the reasons for what can't be converted."""

import json
from typing import Any

import pytest

from plumbline.data.convert import FORMATS, guess_format, tables_of
from plumbline.data.values import Cell, Fault


def said(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Messages that alternate, with these contents."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def fault_of(name: str, record: dict[str, Any]) -> str:
    with pytest.raises(Fault) as raised:
        FORMATS[name].convert(record)
    return str(raised.value)


# hh-rlhf


def hh(chosen: str, rejected: str) -> dict[str, Any]:
    return FORMATS["hh-rlhf"].convert({"chosen": chosen, "rejected": rejected})


def test_a_transcript_of_one_question_gives_a_text_prompt() -> None:
    row = hh("\n\nHuman: Why? \n\nAssistant:  Yes.", "\n\nHuman: Why?\n\nAssistant: No.\n")
    assert row == {"prompt": "Why?", "chosen": "Yes.", "rejected": "No."}


def test_a_long_transcript_gives_messages_up_to_the_last_answer() -> None:
    start = "\n\nHuman: One\n\nAssistant: Two\n\nstill two\n\nHuman: Three\n\nAssistant:"
    row = hh(start + " good", start + " bad")
    assert row["prompt"] == said("One", "Two\n\nstill two", "Three")
    assert (row["chosen"], row["rejected"]) == ("good", "bad")


def test_a_speaker_that_is_quoted_within_a_line_begins_no_turn() -> None:
    text = "\n\nHuman: Who says Human: or\nAssistant: here?\n\nAssistant: The "
    assert hh(text + "log", text + "text") == {
        "prompt": "Who says Human: or\nAssistant: here?",
        "chosen": "The log",
        "rejected": "The text",
    }


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "chosen: turns do not alternate"),
        ("\n\nAssistant: a\n\nHuman: b\n\nAssistant: c", "chosen: turns do not alternate"),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "chosen: turns do not alternate"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "chosen: last turn is not the assistant's"),
        ("\n\nHuman: other\n\nAssistant: c", "chosen and rejected differ before their last turn"),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: a\n\nAssistant: c",
            "chosen and rejected differ before their last turn",
        ),
        ("Hello\n\nHuman: a\n\nAssistant: c", "chosen: expected a transcript"),
        ("a text", "chosen: expected a transcript"),
        ("", "chosen: expected a transcript"),
        (None, "chosen: missing value"),
        (3, "chosen: expected text, got int"),
    ],
)
def test_a_transcript_that_is_no_pair_of_answers_has_a_reason(chosen: Any, reason: str) -> None:
    record = {"chosen": chosen, "rejected": "\n\nHuman: a\n\nAssistant: d"}
    assert fault_of("hh-rlhf", record).startswith(reason)


def test_the_same_fault_in_the_other_transcript_is_named_there() -> None:
    record = {"chosen": "\n\nHuman: a\n\nAssistant: d", "rejected": "x"}
    assert fault_of("hh-rlhf", record).startswith("rejected: expected a transcript")


# sharegpt


@pytest.mark.parametrize("field", ["conversations", "messages"])
@pytest.mark.parametrize(("who", "what"), [("from", "value"), ("role", "content")])
def test_the_last_assistant_turn_is_the_response(field: str, who: str, what: str) -> None:
    names = ["system", "human", "GPT", "user", "assistant", "human"]
    record = {field: [{who: name, what: f"{i}"} for i, name in enumerate(names)]}
    assert FORMATS["sharegpt"].convert(record) == {
        "prompt": [system("0"), *said("1", "2", "3")],
        "response": "4",
    }


def test_messages_in_a_csv_cell_are_json() -> None:
    record = {"messages": Cell(json.dumps(said("Why?", "So.")))}
    assert FORMATS["sharegpt"].convert(record) == {"prompt": "Why?", "response": "So."}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (said("Why?"), "conversations: no assistant turn"),
        (said("So.", "Why?", "So.", first="assistant"), "conversations: turns do not alternate"),
        (said("So.", first="assistant"), "conversations: turns do not alternate"),
        ([system("s"), {"role": "assistant", "content": "x"}], "conversations: turns do not"),
        ([*said("Why?"), system("s"), *said("", "So.")[1:]], "conversations: turns do not"),
        ([{"from": "tool", "value": "x"}], "conversations: unknown role 'tool'"),
        ([{"from": "gpt"}], "conversations: expected the content of a message to be text"),
        ([{"from": ["gpt"], "value": "x"}], "conversations: unknown role"),
        ([{"value": "x"}], "conversations: expected each message to be"),
        (["x"], "conversations: expected each message to be"),
        ([], "conversations: expected text or chat messages, got an empty list"),
        ("text", "conversations: expected text or chat messages, got str"),
        (Cell("text"), "conversations: expected chat messages as JSON, got text"),
        (Cell("[{x"), "conversations: malformed JSON"),
    ],
)
def test_a_conversation_without_a_question_and_its_answer_has_a_reason(
    turns: Any, reason: str
) -> None:
    assert fault_of("sharegpt", {"conversations": turns}).startswith(reason)


def test_a_row_without_a_conversation_is_a_fault() -> None:
    assert fault_of("sharegpt", {"text": "x"}) == "messages: missing value"


# alpaca


@pytest.mark.parametrize("nothing", [{}, {"input": ""}, {"input": " "}, {"input": None}])
def test_an_instruction_without_input_is_the_prompt(nothing: dict[str, Any]) -> None:
    record = {"instruction": "Add 1 and 2.", **nothing, "output": "3"}
    assert FORMATS["alpaca"].convert(record) == {"prompt": "Add 1 and 2.", "response": "3"}


def test_an_input_and_a_system_prompt_are_part_of_the_prompt() -> None:
    record = {"system": "Be brief.", "instruction": "Add.", "input": "1, 2", "output": "3"}
    prompt = [system("Be brief."), *said("Add.\n\n1, 2")]
    assert FORMATS["alpaca"].convert(record) == {"prompt": prompt, "response": "3"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"instruction": None}, "instruction: missing value"),
        ({"output": None}, "output: missing value"),
        ({"output": ["3"]}, "output: expected text, got list"),
        ({"input": 3}, "input: expected text, got int"),
        ({"system": 3}, "system: expected text, got int"),
    ],
)
def test_a_wrong_field_of_an_instruction_is_named(change: dict[str, Any], reason: str) -> None:
    record = {"instruction": "Add.", "input": "1, 2", "output": "3", **change}
    assert fault_of("alpaca", record) == reason


# dpo-pairs

PAIR = {"prompt": "Why?", "chosen": "Good", "rejected": "Bad"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "chosen": "Good", "rejected": "Bad"},
        {"question": "Why?", "system": "", "chosen": "Good", "rejected": "Bad"},
        {"prompt": said("Why?"), "chosen": "Good", "rejected": "Bad"},
        {
            "prompt": said("Why?"),
            "chosen": said("Good", first="assistant"),
            "rejected": said("Bad", first="assistant"),
        },
        {"prompt": "Why?", "chosen": said("Why?", "Good"), "rejected": said("Why?", "Bad")},
        {"chosen": said("Why?", "Good"), "rejected": said("Why?", "Bad")},
        {"prompt": Cell("Why?"), "chosen": Cell("Good"), "rejected": Cell("Bad"), "x": Cell("")},
        {
            "prompt": said("Why?"),
            "chosen": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Good"}],
            "rejected": said("Why?", "Bad"),
        },
    ],
)
def test_every_form_of_a_pair_gives_the_same_row(record: dict[str, Any]) -> None:
    assert FORMATS["dpo-pairs"].convert(record) == PAIR


@pytest.mark.parametrize("prompt", ["Why?", " And? ", None])
def test_whole_conversations_hold_the_prompt(prompt: str | None) -> None:
    start = ["Why?", "So.", "And?"]
    record = {"chosen": said(*start, "Good"), "rejected": said(*start, "Bad"), "prompt": prompt}
    assert FORMATS["dpo-pairs"].convert(record) == {**PAIR, "prompt": said(*start)}


@pytest.mark.parametrize(
    "record",
    [
        {**PAIR, "system": "Be kind."},
        {**PAIR, "prompt": [system("Be kind."), *said("Why?")]},
        {**PAIR, "prompt": [system("Be kind."), *said("Why?")], "system": "Be rude."},
        {"chosen": said("Why?", "Good"), "rejected": said("Why?", "Bad"), "system": "Be kind."},
        {
            "prompt": said("Why?"),
            "chosen": [system("Be kind."), *said("Why?", "Good")],
            "rejected": [system("Be kind."), *said("Why?", "Bad")],
        },
    ],
)
def test_the_system_prompt_comes_first_and_once(record: dict[str, Any]) -> None:
    prompt = [system("Be kind."), *said("Why?")]
    assert FORMATS["dpo-pairs"].convert(record) == {**PAIR, "prompt": prompt}


@pytest.mark.parametrize("margin", [2, 2.0, Cell("2.0")])
def test_a_margin_is_kept(margin: Any) -> None:
    assert FORMATS["dpo-pairs"].convert({**PAIR, "margin": margin}) == {**PAIR, "margin": 2.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "prompt: missing value, and chosen and rejected do not hold"),
        ({"prompt": "x", "chosen": None}, "chosen: missing value"),
        ({"rejected": 3}, "rejected: expected text or chat messages, got int"),
        ({"chosen": said("Why?")}, "chosen: last turn is not the assistant's"),
        ({"chosen": said("Why?", "Good")}, "chosen and rejected differ before"),
        (
            {"chosen": said("What?", "Good"), "rejected": said("Why?", "Bad")},
            "chosen and rejected differ before",
        ),
        (
            {"chosen": said("What?", "Good"), "rejected": said("What?", "Bad")},
            "prompt: not the prompt that chosen and rejected begin with",
        ),
        (
            {
                "prompt": said("Why?"),
                "chosen": said("What?", "Good"),
                "rejected": said("What?", "Bad"),
            },
            "prompt: not the prompt that chosen and rejected begin with",
        ),
        ({"prompt": said("Why?", "So.")}, "prompt: last turn is not the user's"),
        ({"prompt": said("So.", "Why?", first="assistant")}, "turns do not alternate"),
        ({"margin": "much"}, "margin: expected a number"),
    ],
)
def test_what_is_no_pair_has_a_reason(change: dict[str, Any], reason: str) -> None:
    assert fault_of("dpo-pairs", {**PAIR, **change}).startswith(reason)


# Tables


def test_pairs_give_demonstrations_of_what_was_chosen_and_each_prompt_once() -> None:
    pairs = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": said("p", "q", "r"), "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a ", "rejected": "c"},
        {"prompt": "p", "chosen": "c", "rejected": "b"},
    ]
    assert tables_of("preferences", pairs) == {
        "demonstrations": [
            {"prompt": "p", "response": "a"},
            {"prompt": said("p", "q", "r"), "response": "a"},
            {"prompt": "p", "response": "c"},
        ],
        "preferences": pairs,
        "prompts": [{"prompt": "p"}, {"prompt": said("p", "q", "r")}],
    }


def test_demonstrations_give_each_prompt_once_and_no_preferences() -> None:
    rows = [{"prompt": "p", "response": "a"}, {"prompt": "p", "response": "b"}]
    assert tables_of("demonstrations", rows) == {
        "demonstrations": rows,
        "prompts": [{"prompt": "p"}],
    }


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (dict.fromkeys(("chosen", "rejected"), "\n\nHuman: a\n\nAssistant: b"), "hh-rlhf"),
        ({"conversations": said("a", "b")}, "sharegpt"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        (PAIR, "dpo-pairs"),
        ({**PAIR, "messages": said("Why?", "Good")}, "dpo-pairs"),
        ({"text": "x"}, None),
    ],
)
def test_the_format_that_fits_is_found(record: dict[str, Any], expected: str | None) -> None:
    assert guess_format([{}, record, record]) == expected


def test_no_rows_fit_no_format() -> None:
    assert guess_format([]) is None
