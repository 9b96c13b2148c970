"""Chat messages and texts to token ids, by the tokenizer's own chat template."""

import json
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

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


class ChatEncoder:
    """Encodes prompts (JSON lists of messages) and responses for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer names no end token: expected an eos_token, got none")
        self.tokenizer = tokenizer
        self.eos_token_id = int(tokenizer.eos_token_id)
        # Masks come from lengths, so that any token can stand where there is nothing.
        pad = tokenizer.pad_token_id
        self.pad_token_id = self.eos_token_id if pad is None else int(pad)

    def prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Render each prompt up to the assistant's turn: JSON messages to token ids."""
        rendered = [
            self.tokenizer.apply_chat_template(
                json.loads(prompt), tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        return self._encode(rendered)

    def responses(self, responses: Sequence[str]) -> list[list[int]]:
        """Encode each response and close it with the end token."""
        if not responses:
            return []
        # A response that quotes a special token means its letters.
        ids = self.tokenizer(list(responses), add_special_tokens=False, split_special_tokens=True)
        return [[*row, self.eos_token_id] for row in ids["input_ids"]]

    def prompt_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, the chat template included."""
        return [len(ids) for ids in self.prompts(prompts)]

    def response_lengths(self, responses: Sequence[str]) -> list[int]:
        """Tokens of each response, its end token included."""
        return [len(ids) for ids in self.responses(responses)]

    def decode(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """Texts of responses, without special tokens."""
        return [
            self.tokenizer.decode(list(ids), skip_special_tokens=True).strip() for ids in responses
        ]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # The template has already written every special token that belongs there.
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids
