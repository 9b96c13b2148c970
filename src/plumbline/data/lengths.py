"""How many tokens texts have: word by word where the tokenizer allows it, each word once."""

import json
import re
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerBase

KNOWN_PIECES = 2**18
"""So many lengths are remembered before all are forgotten: some 30 MB."""

_CUT = re.compile(r"(?<=\S)(?= \S)")
# Of two spaces before a letter the first is a piece by itself; before another space, a digit or a
# special token it need not be.
_UNSAFE = re.compile(r"  (?![A-Za-z])")
# Two words with a line break between them are seldom seen again: such a piece is cut once more.
_BREAK = re.compile(r"(?<=[A-Za-z])(?=[.,:;!?]?\s)")

# The patterns of Llama 3 and of Qwen 2, which differ in how many digits make a piece.
_SPLITS = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)


class TokenLengths:
    """Counts the tokens of texts as the tokenizer would encode them, without special tokens added.

    Texts are made of the same words over and over, and most tokenizers encode each word by itself.
    Where that is known of a tokenizer (`cuts_before_words`), each word is encoded once and then
    looked up: the counts are the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, as_letters: bool) -> None:
        """Look at the tokenizer; `as_letters` if special tokens in the texts mean their letters."""
        self._tokenizer = tokenizer
        self._as_letters = as_letters
        self._by_word = cuts_before_words(tokenizer)
        if self._by_word:
            self._pieces = _Lengths(tokenizer.backend_tokenizer)
            self._words = _LengthsAfterSpace(self._pieces)

    def of(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text."""
        if not texts:
            return []
        if not self._by_word:
            encoded = self._tokenizer(
                list(texts), add_special_tokens=False, split_special_tokens=self._as_letters
            )
            return [len(ids) for ids in encoded["input_ids"]]
        backend = self._tokenizer.backend_tokenizer
        # Other uses of the tokenizer may have asked these of it.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self._as_letters
        return [self._length(text) for text in texts]

    def _length(self, text: str) -> int:
        first, *words = text.split(" ")
        try:
            if words and (first[-1:].isspace() or _UNSAFE.search(text)):
                raise _NoWord
            return self._pieces[first] + sum(map(self._words.__getitem__, words))
        except _NoWord:
            return sum(map(self._pieces.__getitem__, _CUT.split(text)))


def cuts_before_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text's tokens are those of its parts, cut before each single space between words.

    True of the byte-level BPE tokenizers whose rules are known here: their patterns let no piece
    hold a space behind another character but white space, so that the cuts are among their own.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return False
    return (
        isinstance(backend.model, models.BPE)
        and backend.model.dropout is None
        # A space starts anew for Unicode's composition, so that it acts on the parts alike.
        and isinstance(backend.normalizer, normalizers.NFC | None)
        and _splits_known(backend)
        and not any(_reaches_out(token) for token in tokenizer.added_tokens_decoder.values())
    )


def _reaches_out(token: AddedToken) -> bool:
    """Whether a cut may change where the token is found, or a word may be the token."""
    return (
        token.lstrip
        or token.rstrip
        or token.single_word
        or token.content[:1].isalpha()
        or any(map(str.isspace, token.content))
    )


def _splits_known(backend: Tokenizer) -> bool:
    if backend.pre_tokenizer is None:
        return False
    rule = json.loads(backend.pre_tokenizer.__getstate__())
    rules = rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
    # Digits stand apart in some; then comes a pattern, and at last the bytes are spelled.
    *digits, last = [rule for rule in rules if rule["type"] != "Split"]
    patterns = [rule for rule in rules if rule["type"] == "Split"]
    return (
        last["type"] == "ByteLevel"
        and not last["add_prefix_space"]
        and rules[-1] is last
        and all(rule["type"] == "Digits" for rule in digits)
        and (
            (last["use_regex"] and not patterns)
            or (
                not last["use_regex"]
                and len(rules) == 2
                and patterns[0]["pattern"].get("Regex") in _SPLITS
                and patterns[0]["behavior"] == "Isolated"
                and not patterns[0]["invert"]
            )
        )
    )


class _NoWord(Exception):
    """White space is next to a space, and no cut between them is known to be safe."""


class _Lengths(dict[str, int]):
    """The number of tokens of each piece of text that was asked for."""

    def __init__(self, backend: Tokenizer) -> None:
        super().__init__()
        self.backend = backend

    def __missing__(self, piece: str) -> int:
        head, *rest = _BREAK.split(piece)
        if rest:
            return self[head] + sum(map(self.__getitem__, rest))
        return self._remember(piece, piece)

    def _remember(self, key: str, piece: str) -> int:
        if len(self) >= KNOWN_PIECES:
            self.clear()
        self[key] = length = len(self.backend.encode(piece, add_special_tokens=False))
        return length


class _LengthsAfterSpace(_Lengths):
    """The same of a space and the word that follows it, if any, by the word."""

    def __init__(self, pieces: _Lengths) -> None:
        super().__init__(pieces.backend)
        self._pieces = pieces

    def __missing__(self, word: str) -> int:
        if word != word.strip():
            raise _NoWord
        head, *rest = _BREAK.split(word)
        if rest:
            return self[head] + sum(map(self._pieces.__getitem__, rest))
        return self._remember(word, " " + word)
