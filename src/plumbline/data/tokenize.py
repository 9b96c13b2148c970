"""Chat messages and texts to token ids, by the tokenizer's own chat template."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from plumbline.data.lengths import TokenLengths
from plumbline.errors import DataError, ParamsError

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

SCRATCH_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For pretrained tokenizers that bring no chat template of their own."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with the project's chat template.

    Args:
        texts: what the merges are learned from, in a fixed order.
        vocab_size: entries, the special tokens included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=SCRATCH_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def training_texts(prompts: Iterable[str], responses: Iterable[str]) -> list[str]:
    """What a tokenizer learns its merges from: the turns of the prompts, and the responses."""
    turns = [message["content"] for prompt in prompts for message in json.loads(prompt)]
    return [*turns, *responses]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer's special tokens as they are written, in the order of their ids."""
    added = tokenizer.added_tokens_decoder
    return [added[index].content for index in sorted(added) if added[index].special]


class ChatEncoder:
    """Encodes prompts (JSON lists of messages) and responses for one tokenizer.

    Only the chat template writes special tokens. Where a content spells one, it means its letters.

    Attributes:
        end_token_id: closes a response: the template's end of a turn, else the tokenizer's eos.
        stop_token_ids: what ends a sampled response: `end_token_id`, and eos where it is another.
        pad_token_id: stands where there is nothing; masks come from lengths, so that any will do.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find out how the tokenizer's chat template ends a turn.

        Raises:
            ParamsError: the template is malformed, or neither it nor the tokenizer has an end.
        """
        self.tokenizer = tokenizer
        end, eos, pad = _end_of_turn(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id
        ends = [int(index) for index in (end, eos) if index is not None]
        if not ends:
            raise ParamsError(
                "the tokenizer names no end token: expected an eos_token, or a chat template that "
                "closes the assistant's turn with a special token; got neither. Set "
                "model.chat_template."
            )
        self.end_token_id = ends[0]
        self.stop_token_ids = tuple(dict.fromkeys(ends))
        self.pad_token_id = self.end_token_id if pad is None else int(pad)
        specials = [t for t in tokenizer.added_tokens_decoder.values() if t.special]
        # Tokenizers take the longest one that matches.
        specials.sort(key=lambda token: len(token.content), reverse=True)
        self._spelled = _any_of(re.escape(token.content) for token in specials)
        self._written = _any_of(_with_margins(token) for token in specials)
        self._lengths = TokenLengths(tokenizer, as_letters=False)
        self._letter_lengths = TokenLengths(tokenizer, as_letters=True)

    def prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Render each prompt up to the assistant's turn: JSON messages to token ids.

        Raises:
            DataError: the chat template refuses a prompt, for example because of a system role.
        """
        rendered = self._render(prompts)
        plain = iter(self._encode([text for text, quoted in rendered if not quoted]))
        return [
            self._encode_quoting(text, quoted) if quoted else next(plain)
            for text, quoted in rendered
        ]

    def responses(self, responses: Sequence[str]) -> list[list[int]]:
        """Encode each response and close it with the end token."""
        return [[*row, self.end_token_id] for row in self._encode(responses, as_letters=True)]

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, the chat template included; raises as `prompts` does."""
        rendered = self._render(prompts)
        plain = iter(self._lengths.of([text for text, quoted in rendered if not quoted]))
        return [
            len(self._encode_quoting(text, quoted)) if quoted else next(plain)
            for text, quoted in rendered
        ]

    def response_lengths(self, responses: Sequence[str]) -> list[int]:
        """Tokens of each response, its end token included."""
        return [length + 1 for length in self._letter_lengths.of(responses)]

    def decode(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """Texts of responses, without special tokens."""
        return [
            self.tokenizer.decode(
                [index for index in ids if index not in self.stop_token_ids],
                skip_special_tokens=True,
            ).strip()
            for ids in responses
        ]

    def _render(self, prompts: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
        """The rendered prompts, with stand-ins for the special tokens that contents spell.

        Also what each stand-in, a character that no content of the prompt has, stands for.
        """
        quoted = [self._quote(prompt) for prompt in prompts]
        # In one call, whose own work on each of them costs more than the template's.
        conversations = [messages for messages, _ in quoted]
        texts = _rendered(self.tokenizer, conversations, add_generation_prompt=True)
        return [(text, stands_for) for text, (_, stands_for) in zip(texts, quoted, strict=True)]

    def _quote(self, prompt: str) -> tuple[list[dict[str, str]], dict[str, str]]:
        """The messages with stand-ins, and what each of these stands for."""
        messages = json.loads(prompt)
        contents = "".join(message["content"] for message in messages)
        found = dict.fromkeys(self._spelled.findall(contents))
        unused = (chr(c) for c in _PRIVATE_USE if chr(c) not in contents)
        stand_ins = dict(zip(found, unused, strict=False))
        if stand_ins:
            for message in messages:
                message["content"] = self._spelled.sub(
                    lambda match: stand_ins[match[0]], message["content"]
                )
        return messages, {stand_in: token for token, stand_in in stand_ins.items()}

    def _encode_quoting(self, text: str, quoted: Mapping[str, str]) -> list[int]:
        # Tokenizers cut a text at its special tokens first, so that encoding it in these parts
        # gives what encoding the whole gives.
        table = str.maketrans(dict(quoted))
        ids: list[int] = []
        written = ""
        for part in self._written.split(text):
            letters = part.translate(table)
            if letters == part:
                written += part
            else:
                ids += [*self._encode([written])[0], *self._encode([letters], as_letters=True)[0]]
                written = ""
        return [*ids, *self._encode([written])[0]]

    def _encode(self, texts: Sequence[str], *, as_letters: bool = False) -> list[list[int]]:
        if not texts:
            return []
        # The template has already written every special token that belongs there.
        ids: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=as_letters
        )["input_ids"]
        return ids


_PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Characters without a meaning (Unicode's supplementary private use area A)."""
_PROBE = "zqjxkv"


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict[str, str]]],
    **options: bool,
) -> list[str]:
    if not conversations:
        return []
    try:
        texts: list[str] = tokenizer.apply_chat_template(conversations, tokenize=False, **options)
        return texts
    except TemplateSyntaxError as error:
        raise ParamsError(
            f"model.chat_template: expected a Jinja template, got a syntax error ({error})"
        ) from error
    except TemplateError as error:
        raise DataError(
            f"the chat template refuses this prompt ({error}); change it, or set "
            "model.chat_template to one that takes it"
        ) from error


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template writes right after an assistant's content, if any."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
    try:
        [text] = _rendered(tokenizer, [turns])
    except DataError:
        return None
    _, found, after = text.rpartition(_PROBE)
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    ends = [token for token in added if found and after.lstrip().startswith(token)]
    return added[max(ends, key=len)] if ends else None


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(patterns) or '(?!)'})")


def _with_margins(token: AddedToken) -> str:
    """What a tokenizer cuts out for a token: some take the white space around them along."""
    before, after = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return f"{before}{re.escape(token.content)}{after}"
