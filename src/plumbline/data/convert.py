"""From rows of public formats to rows of our tables; a `Fault` says why one cannot be converted."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from plumbline.data.values import CONVERTERS, Cell, Fault, decoded, turns_of

Row = dict[str, Any]
Turns = list[dict[str, str]]

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""The names that sources give to the roles, in lower case."""

PROBE = 100
"""How many rows are looked at to guess a format."""


class Format(NamedTuple):
    """A public format: what it looks like, and what one of its rows becomes."""

    table: str
    """The table that a row of the source becomes a row of; the others are made from that one."""
    columns: str
    """The columns that it is known by, for error messages."""
    convert: Callable[[Mapping[str, Any]], Row]
    """One row to one row of `table`; raises `Fault`."""


def tables_of(table: str, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """All tables that converted rows of `table` give, each in the order of the rows.

    A pair also gives a demonstration, of its chosen response. What is derived is given once: the
    prompts, and the demonstrations from pairs that share prompt and chosen response.
    """
    prompts = _distinct({"prompt": row["prompt"]} for row in rows)
    if table == "demonstrations":
        return {"demonstrations": list(rows), "prompts": prompts}
    chosen = _distinct({"prompt": row["prompt"], "response": row["chosen"]} for row in rows)
    return {"demonstrations": chosen, "preferences": list(rows), "prompts": prompts}


def guess_format(records: Iterable[Mapping[str, Any]]) -> str | None:
    """The format that fits most of the first rows; None where none fits any."""
    first = [record for record, _ in zip(records, range(PROBE), strict=False)]
    fits = {name: sum(_fits(form, record) for record in first) for name, form in FORMATS.items()}
    # Pairs say more than conversations, where a source holds both.
    best = max(fits, key=lambda name: (fits[name], FORMATS[name].table == "preferences"))
    return best if fits[best] else None


def _fits(form: Format, record: Mapping[str, Any]) -> bool:
    try:
        form.convert(record)
    except Fault:
        return False
    return True


def _distinct(rows: Iterable[Row]) -> list[Row]:
    # As validation compares them: the space around a response does not make another one.
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(json.dumps([row["prompt"], row.get("response", "").strip()]), row)
    return list(first.values())


# hh-rlhf: two transcripts that differ in their last turn.

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def _hh_rlhf(record: Mapping[str, Any]) -> Row:
    chosen, rejected = (_transcript(record, field) for field in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Fault("chosen and rejected differ before their last turn")
    return _pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _transcript(record: Mapping[str, Any], field: str) -> Turns:
    """The turns of a transcript; its last is the assistant's."""
    before, *parts = _HH_TURN.split(_text(record, field))
    with _naming(field):
        if before.strip() or not parts:
            raise Fault('expected a transcript that begins with "\\n\\nHuman:"')
        turns = [
            {"role": SPEAKERS[speaker.lower()], "content": content.strip()}
            for speaker, content in zip(parts[::2], parts[1::2], strict=True)
        ]
        return _answered(turns)


# sharegpt and alpaca: one answer a row.


def _sharegpt(record: Mapping[str, Any]) -> Row:
    """The last assistant turn is the response; what a user says after it has no answer."""
    field = "messages" if record.get("conversations") is None else "conversations"
    with _naming(field):
        turns = _messages(record.get(field))
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
        if not turns:
            raise Fault("no assistant turn")
        return {"prompt": _prompt(_answered(turns)[:-1]), "response": turns[-1]["content"]}


def _alpaca(record: Mapping[str, Any]) -> Row:
    text = _text(record, "instruction")
    if _is_given(record.get("input")):
        text = f"{text}\n\n{_text(record, 'input')}"
    turns = _with_system([{"role": "user", "content": text}], record)
    return {"prompt": _prompt(turns), "response": _text(record, "output")}


# dpo-pairs: a prompt and two answers; the prompt may also, or only, be inside the answers.


def _dpo_pairs(record: Mapping[str, Any]) -> Row:
    before_chosen, chosen = _answer(record, "chosen")
    before_rejected, rejected = _answer(record, "rejected")
    if before_chosen != before_rejected:
        raise Fault("chosen and rejected differ before their last turn")
    row = _pair(_with_system(_asked(record, before_chosen), record), chosen, rejected)
    if record.get("margin") is not None:
        with _naming("margin"):
            row["margin"] = CONVERTERS["margin"](record["margin"])
    return row


def _answer(record: Mapping[str, Any], field: str) -> tuple[Turns, str]:
    """The turns before the answer, which may be none, and the answer."""
    with _naming(field):
        value = decoded(record.get(field))
        if isinstance(value, str):
            return [], value
        turns = _messages(value)
        if turns[-1]["role"] != "assistant":
            raise Fault("last turn is not the assistant's")
        return turns[:-1], turns[-1]["content"]


def _asked(record: Mapping[str, Any], before: Turns) -> Turns:
    """The turns of the prompt: the prompt column and what stands before the answers must agree."""
    asked_in_question = _is_given(record.get("question")) and not _is_given(record.get("prompt"))
    field = "question" if asked_in_question else "prompt"
    with _naming(field):
        given = decoded(record.get(field))
        if before and not _is_given(given):
            return before
        if given is None:
            raise Fault("missing value, and chosen and rejected do not hold the prompt either")
        if isinstance(given, str):
            said = [turn["content"].strip() for turn in before if turn["role"] == "user"]
            agree = given.strip() in said
            turns = before or [{"role": "user", "content": given}]
        else:
            given = _messages(given)
            agree = _talk(given) == _talk(before)
            turns = max(given, before, key=len)
        if before and not agree:
            raise Fault("not the prompt that chosen and rejected begin with")
        return turns


# What the formats share.


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Say in a fault which field has it."""
    try:
        yield
    except Fault as fault:
        raise Fault(f"{field}: {fault}") from fault


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def _text(record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    if value is None:
        raise Fault(f"{field}: missing value")
    if not isinstance(value, str):
        raise Fault(f"{field}: expected text, got {type(value).__name__}")
    return value


def _messages(value: Any) -> Turns:
    """Messages under either pair of keys, from/value or role/content, as ours."""
    value = decoded(value)
    if isinstance(value, list):
        value = [_message(turn) if isinstance(turn, dict) else turn for turn in value]
    elif isinstance(value, Cell):
        raise Fault("expected chat messages as JSON, got text")
    return turns_of(value)


def _message(turn: dict[str, Any]) -> dict[str, Any]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(role, str):
        role = SPEAKERS.get(role.strip().lower(), role)
    return {"role": role, "content": content}


def _talk(turns: Turns) -> Turns:
    """The turns without the system prompt."""
    return turns[1:] if turns and turns[0]["role"] == "system" else turns


def _answered(turns: Turns) -> Turns:
    """The turns, where they are a prompt and its answer."""
    if turns[-1]["role"] != "assistant":
        raise Fault("last turn is not the assistant's")
    roles = [turn["role"] for turn in _talk(turns)]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise Fault("turns do not alternate between user and assistant, user first")
    return turns


def _with_system(turns: Turns, record: Mapping[str, Any]) -> Turns:
    """The turns below the system prompt of the `system` column, unless they have one."""
    if not _is_given(record.get("system")) or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": _text(record, "system")}, *turns]


def _pair(prompt: Turns, chosen: str, rejected: str) -> Row:
    return {"prompt": _prompt(prompt), "chosen": chosen, "rejected": rejected}


def _prompt(turns: Turns) -> str | Turns:
    """A single question as text, anything longer as messages."""
    if turns[-1]["role"] != "user":
        raise Fault("prompt: last turn is not the user's")
    _answered([*turns, {"role": "assistant", "content": ""}])
    return turns if len(turns) > 1 else turns[0]["content"]


FORMATS: dict[str, Format] = {
    "hh-rlhf": Format(
        "preferences",
        'chosen and rejected, transcripts "\\n\\nHuman: …\\n\\nAssistant: …"',
        _hh_rlhf,
    ),
    "sharegpt": Format(
        "demonstrations", 'conversations [{"from": …, "value": …}], or messages', _sharegpt
    ),
    "alpaca": Format("demonstrations", "instruction, output and if need be input, texts", _alpaca),
    "dpo-pairs": Format(
        "preferences",
        "prompt (or question), chosen and rejected, texts or messages, and if need be system",
        _dpo_pairs,
    ),
}
"""Every format that can be imported, by the name that the command line gives it."""
