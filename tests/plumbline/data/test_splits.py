"""The split of a prompt: stable, the same for the same text, and as large as was asked."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plumbline.data.splits import prompt_id, split_of

FRACTIONS = st.floats(0, 1, exclude_min=True, exclude_max=True)
WORDS = st.lists(st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1))
IDS = st.binary(min_size=32, max_size=32).map(bytes.hex)


def user(text: str) -> str:
    return json.dumps([{"role": "user", "content": text}], ensure_ascii=False)


def test_prompt_id_of_a_known_prompt_never_changes() -> None:
    expected = hashlib.sha256(b'[["user", "hello world"]]').hexdigest()
    assert prompt_id(user("  Hello\tWORLD\n")) == expected


@given(WORDS, st.sampled_from([" ", "\n", "\t ", "\u00a0"]))
def test_prompt_id_ignores_case_and_white_space(words: list[str], space: str) -> None:
    plain = user(" ".join(words))
    assert prompt_id(user(space + space.join(words).upper() + space)) == prompt_id(plain)


@pytest.mark.parametrize(
    ("one", "other"), [("café", "cafe\u0301"), ("Straße", "STRASSE"), ("ﬁne", "fine")]
)
def test_prompt_id_ignores_the_unicode_form(one: str, other: str) -> None:
    assert prompt_id(user(one)) == prompt_id(user(other))


def test_prompt_id_tells_roles_and_turn_boundaries_apart() -> None:
    turns = [("user", "a b"), ("system", "a b"), ("user", "ab")]
    conversations = [[turn] for turn in turns] + [[("system", "a"), ("user", "b")]]
    ids = {
        prompt_id(json.dumps([{"role": role, "content": text} for role, text in conversation]))
        for conversation in conversations
    }
    assert len(ids) == len(conversations)


@given(IDS, FRACTIONS, FRACTIONS)
def test_a_larger_fraction_only_moves_train_to_test(identity: str, a: float, b: float) -> None:
    small, large = sorted((a, b))
    if split_of(identity, small) == "test":
        assert split_of(identity, large) == "test"


@given(IDS, st.text("0123456789abcdef", min_size=48, max_size=48), FRACTIONS)
def test_the_first_eight_bytes_decide(identity: str, tail: str, fraction: float) -> None:
    assert split_of(identity[:16] + tail, fraction) == split_of(identity, fraction)


@pytest.mark.parametrize(
    ("head", "split"), [("3fffffffffffffff", "test"), ("4000000000000000", "train")]
)
def test_the_border_is_exact(head: str, split: str) -> None:
    assert split_of(head + "0" * 48, 0.25) == split


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_share_of_test_prompts_is_as_asked(fraction: float) -> None:
    count = 4000
    splits = [split_of(prompt_id(user(f"prompt {i}")), fraction) for i in range(count)]
    # Five standard deviations of a binomial share; the prompts are fixed, so this cannot flicker.
    tolerance = 5 * (fraction * (1 - fraction) / count) ** 0.5
    assert splits.count("test") / count == pytest.approx(fraction, abs=tolerance)
