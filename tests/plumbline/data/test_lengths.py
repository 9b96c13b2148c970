"""Counting by words gives the counts of the tokenizer itself, whatever the text and the rules."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerFast

from plumbline.data import lengths
from plumbline.data.lengths import TokenLengths, cuts_before_words

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# Runs of white space and what follows them are where the rules differ: they become tokens here.
TEXTS = [
    "fold the sheet, fold  the   sheet in half;\n\n  then fold it  again \n 12 times.\n\n",
    "the  12  sheets,\t\tthe 1234 sheets \n\nit's  what\r\n  they'll fold    ",
    "  a \u00a0b  é e\u0301 \u2003 ,  , .\n .\n\n  ½ ½  ١  1",
] * 3


def tokenizer(
    split: PreTokenizer,
    normalizer: Normalizer | None = None,
    end: str = "<|end|>",
    **special: bool,
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(end, special=True, **special)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end)


def split_by(pattern: str) -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def digits_and(split: PreTokenizer, *, one_by_one: bool) -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=one_by_one), split])


KNOWN = {
    "GPT-2": tokenizer(GPT_2),
    "SmolLM2": tokenizer(digits_and(GPT_2, one_by_one=True)),
    "whole numbers": tokenizer(digits_and(GPT_2, one_by_one=False)),
    "Llama 3": tokenizer(split_by(LLAMA_3)),
    "Qwen 2": tokenizer(split_by(LLAMA_3.replace("{1,3}", "")), normalizers.NFC()),
}
UNKNOWN = {
    "prefix space": tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "another pattern": tokenizer(split_by(r"\w+\s*|\W+")),
    "metaspace": tokenizer(pre_tokenizers.Metaspace()),
    "lower case": tokenizer(GPT_2, normalizers.Lowercase()),
    "end is a word": tokenizer(GPT_2, end="END"),
    "end is two words": tokenizer(GPT_2, end="<the end>"),
    "end takes the space before it": tokenizer(GPT_2, lstrip=True),
    "end takes the space behind it": tokenizer(GPT_2, rstrip=True),
}
PARTS = [
    "a",
    "fold",
    "sheet",
    " ",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u2003",
    "\x1c",
    "\x85",
]
PARTS += [
    "fold.\n\n",
    "1",
    "12",
    "½",
    "١",
    ",",
    ".",
    "'s",
    "é",
    "\u0301",
    "\u200d",
    "<|end|>",
    "<|",
    "\x00",
]
any_text = st.lists(st.sampled_from(PARTS) | st.characters(codec="utf-8"), max_size=12).map("".join)


def encoded(tokens: PreTrainedTokenizerFast, text: str, *, as_letters: bool) -> int:
    ids = tokens(text, add_special_tokens=False, split_special_tokens=as_letters)["input_ids"]
    return len(ids)


@pytest.mark.parametrize("name", KNOWN)
@given(text=any_text, as_letters=st.booleans())
@settings(max_examples=400)
def test_the_counts_are_those_of_the_encoded_texts(name: str, text: str, as_letters: bool) -> None:
    counter = TokenLengths(KNOWN[name], as_letters=as_letters)
    assert counter.of([text]) == [encoded(KNOWN[name], text, as_letters=as_letters)]


@pytest.mark.parametrize("name", KNOWN)
def test_words_are_counted_once_where_the_rules_are_known(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cuts_before_words(KNOWN[name])
    counter = TokenLengths(KNOWN[name], as_letters=True)
    once = counter.of(["fold the sheet", "the sheet  fold"])
    monkeypatch.setattr(lengths._Lengths, "_remember", _forbidden)
    assert counter.of(["fold the sheet", "the sheet  fold", "fold sheet"])[:2] == once


def _forbidden(*args: object) -> int:
    raise AssertionError(f"counted again: {args[1:]}")


@pytest.mark.parametrize("name", UNKNOWN)
def test_whole_texts_are_encoded_where_they_are_not(name: str) -> None:
    tokens = UNKNOWN[name]
    assert not cuts_before_words(tokens)
    texts = ["fold  THE sheet <|end|> again", "1  2", ""]
    assert TokenLengths(tokens, as_letters=False).of(texts) == [
        encoded(tokens, text, as_letters=False) for text in texts
    ]


def test_other_uses_of_the_tokenizer_make_no_difference() -> None:
    tokens = KNOWN["GPT-2"]
    counters = [TokenLengths(tokens, as_letters=as_letters) for as_letters in (False, True)]
    text = "fold <|end|> " + "sheet-" * 20
    expected = [encoded(tokens, text, as_letters=as_letters) for as_letters in (False, True)]
    tokens(["a", text], truncation=True, max_length=3, padding="max_length")
    assert [counter.of([text]) for counter in counters] == [[n] for n in expected]
    assert expected[0] < expected[1]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "KNOWN_PIECES", 3)
    counter = TokenLengths(KNOWN["GPT-2"], as_letters=True)
    texts = [f"fold {word} sheet" for word in "abcdefgh"]
    assert counter.of(texts) == [encoded(KNOWN["GPT-2"], text, as_letters=True) for text in texts]
    assert len(counter._words) <= 3


def test_no_texts() -> None:
    for tokens in (KNOWN["GPT-2"], UNKNOWN["metaspace"]):
        assert TokenLengths(tokens, as_letters=True).of([]) == []
