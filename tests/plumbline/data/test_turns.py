"""Which turns of a long conversation go, and that no more go than must."""

import json
from collections.abc import Sequence

import pytest

from plumbline.data.turns import shortened, without_oldest_turn
from plumbline.data.values import conversation
from plumbline.errors import DataError

ROLES = {"s": "system", "u": "user", "a": "assistant"}


def prompt(*turns: str) -> str:
    """The canonical JSON of turns given as "u:text"."""
    messages = [{"role": ROLES[turn[0]], "content": turn[2:]} for turn in turns]
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))


class LetterCounter:
    """One token a letter; a conversation that starts with the assistant's turn is refused."""

    def __init__(self) -> None:
        self.calls = 0

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        self.calls += 1
        if any(conversation(text)[0]["role"] == "assistant" for text in prompts):
            raise DataError("refused")
        return [sum(len(turn["content"]) for turn in conversation(text)) for text in prompts]

    def response_lengths(self, responses: Sequence[str]) -> list[int]:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("whole", "rest"),
    [
        (("u:a", "a:b", "u:c"), ("u:c",)),
        (("s:S", "u:a", "a:b", "u:c", "a:d", "u:ż"), ("s:S", "u:c", "a:d", "u:ż")),
        (("u:a", "u:b"), ("u:b",)),
        (("u:a", "a:b", "a:c", "s:T", "u:d"), ("u:d",)),
        (("a:hello", "u:a", "a:b", "u:c"), ("u:a", "a:b", "u:c")),
        (("s:S", "s:T", "a:x", "u:a"), ("s:S", "s:T", "u:a")),
        (("u:a",), None),
        (("s:S", "u:a"), None),
    ],
)
def test_the_oldest_turn_goes_with_what_answers_it(
    whole: tuple[str, ...], rest: tuple[str, ...] | None
) -> None:
    assert without_oldest_turn(prompt(*whole)) == (None if rest is None else prompt(*rest))


def test_no_more_goes_than_must() -> None:
    whole = prompt("s:SS", "u:aa", "a:bb", "u:cc", "a:dd", "u:ee")
    rests = {
        11: prompt("s:SS", "u:cc", "a:dd", "u:ee"),
        8: prompt("s:SS", "u:cc", "a:dd", "u:ee"),
        7: prompt("s:SS", "u:ee"),
        4: prompt("s:SS", "u:ee"),
    }
    for limit, rest in rests.items():
        assert shortened([whole], limit, LetterCounter()) == {whole: rest}
    assert shortened([whole], 12, LetterCounter()) == {}, "it fits"
    assert shortened([whole], 3, LetterCounter()) == {}, "it cannot be made to fit"


def test_many_prompts_are_counted_together() -> None:
    counter = LetterCounter()
    whole = [prompt(f"u:{i:09d}", "a:bb", f"u:{i}") for i in range(500)]
    assert shortened(whole, 4, counter) == {text: prompt(f"u:{i}") for i, text in enumerate(whole)}
    assert counter.calls == 2


def test_prompts_that_the_template_refuses_are_left_alone() -> None:
    refused = prompt("a:hello there", "u:aaaaa", "a:b", "u:c")
    fine = prompt("u:aaaaa", "a:b", "u:c")
    assert shortened([refused, fine], 2, LetterCounter()) == {fine: prompt("u:c")}


def test_nothing_to_cut() -> None:
    assert shortened([], 1, LetterCounter()) == {}
