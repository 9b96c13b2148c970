"""From a value as a file has it to the canonical one; a `Fault` says why it cannot be done."""

import json
from collections.abc import Callable
from typing import Any

ROLES = ("system", "user", "assistant")


class Fault(Exception):
    """A value that cannot be brought into canonical form; the message is the reason."""


class Cell(str):
    """The text of a csv cell, which may stand for a number, a bool or chat messages."""


def conversation(prompt: str) -> list[dict[str, str]]:
    """The messages of a canonical prompt: `[{"role": …, "content": …}, …]`."""
    messages: list[dict[str, str]] = json.loads(prompt)
    return messages


def excerpt(value: object, centre: int = 0, width: int = 60) -> str:
    """At most `width` characters of a value around `centre`, with unprintable ones escaped."""
    text = value if isinstance(value, str) else "" if value is None else repr(value)
    start = max(0, min(centre - width // 2, len(text) - width))
    window = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text[start : start + width]
    )
    return f"{'…' if start else ''}{window}{'…' if start + width < len(text) else ''}"


def decoded(value: Any) -> Any:
    """Chat messages in a csv cell are JSON text; anything else is returned as it is."""
    if isinstance(value, Cell) and value.startswith("[{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Fault(f"malformed JSON in chat messages ({error})") from error
    return value


def turns_of(value: Any) -> list[dict[str, str]]:
    """The messages that a value holds; `Fault` where they are not well formed."""
    if value is None:
        raise Fault("missing value")
    if not isinstance(value, list) or not value:
        raise Fault(f"expected text or chat messages, got {_kind(value)}")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or turn.get("role") is None or "content" not in turn:
            raise Fault('expected each message to be {"role": …, "content": …}')
        if turn["role"] not in ROLES:
            raise Fault(f"unknown role {excerpt(turn['role'])!r}, expected {', '.join(ROLES)}")
        if not isinstance(turn["content"], str):
            raise Fault(
                f"expected the content of a message to be text, got {_kind(turn['content'])}"
            )
        turns.append({"role": turn["role"], "content": _unicode(turn["content"])})
    return turns


def _prompt(value: Any) -> str:
    value = decoded(value)
    if isinstance(value, str):
        return _encode([{"role": "user", "content": _unicode(value)}])
    turns = turns_of(value)
    if turns[-1]["role"] != "user":
        raise Fault("last turn is not the user's")
    return _encode(turns)


def _response(value: Any) -> str:
    value = decoded(value)
    if isinstance(value, str):
        return _unicode(value)
    turns = turns_of(value)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise Fault(f"expected text or one assistant message, got {len(turns)} message(s)")
    return turns[0]["content"]


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, Cell) and not value.strip())


def _margin(value: Any) -> float:
    if _is_absent(value):
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float | Cell):
        raise Fault(f"expected a number, got {_kind(value)}")
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise Fault("expected a number") from error
    if number != number:
        raise Fault("expected a number, got NaN")
    return number


def _bool(value: Any) -> bool:
    if _is_absent(value):
        raise Fault("missing value")
    if isinstance(value, Cell):
        value = _BOOLS.get(value.strip().lower(), value)
    # True == 1 and False == 0, so this takes both spellings and nothing else.
    if not isinstance(value, int | float) or value not in (0, 1):
        raise Fault("expected true, false, 1 or 0")
    return bool(value)


_BOOLS = {"true": True, "1": True, "false": False, "0": False}


def _clean(value: Any) -> bool:
    return True if _is_absent(value) else _bool(value)


def _split(value: Any) -> str | None:
    if _is_absent(value):
        return None
    if value not in ("train", "test"):
        raise Fault('expected "train" or "test"')
    return str(value)


CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "prompt": _prompt,
    "response": _response,
    "chosen": _response,
    "rejected": _response,
    "margin": _margin,
    "clean": _clean,
    "label": _bool,
    "split": _split,
}
"""How each field becomes canonical; each raises `Fault`."""


def _unicode(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Fault("not valid Unicode (a lone surrogate)") from error
    return str(text)


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__


def _encode(turns: list[dict[str, str]]) -> str:
    """The compact JSON of messages."""
    # Of a text alone the encoder is three times as fast as of a list of dictionaries.
    messages = (
        f'{{"role":{_quoted(turn["role"])},"content":{_quoted(turn["content"])}}}' for turn in turns
    )
    return f"[{','.join(messages)}]"


_quoted = json.JSONEncoder(ensure_ascii=False).encode
