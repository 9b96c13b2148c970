"""The tokenizer from scratch, and the encoder over any tokenizer's own chat template."""

import json
from collections.abc import Callable, Sequence

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from plumbline.data.tokenize import (
    END,
    PAD,
    PLAIN_TEMPLATE,
    ROLES,
    ChatEncoder,
    train_tokenizer,
    training_texts,
)

TEXTS = ("Fold the sheet along the middle.", "Fold it in half, and then in half again.")


@pytest.mark.parametrize(
    "text",
    [
        "Fold the sheet.",
        "two  spaces, a\ttab\nand a line",
        "don't , can't . stop",
        "Zażółć gęślą jaźń",
        "你好, 🎉 \u200d",
        "\x7f§",
    ],
)
def test_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_letters_the_training_never_saw_become_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("你", add_special_tokens=False)["input_ids"]
    assert len(ids) == len("你".encode())
    assert all(index >= 5 for index in ids), "no special token stands for an unknown letter"


def test_the_vocabulary_has_the_size_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 300
    assert len(train_tokenizer(TEXTS, vocab_size=270)) == 270


def test_special_tokens_come_first_and_are_one_token_each(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    specials = [PAD, END, *ROLES]
    assert [tokenizer.convert_tokens_to_ids(token) for token in specials] == [0, 1, 2, 3, 4]
    assert [tokenizer(token)["input_ids"] for token in specials] == [[i] for i in range(5)]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.padding_side == "left"


def test_frequent_words_are_shorter_than_their_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer("fold the", add_special_tokens=False)["input_ids"]) < len("fold the")


def test_training_is_deterministic() -> None:
    first, second = (train_tokenizer(TEXTS, vocab_size=280) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_training_texts_are_the_turns_and_the_responses() -> None:
    conversation = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    prompts = [json.dumps([*conversation, {"role": "user", "content": "C"}])]
    assert training_texts(prompts, ["D"]) == ["A", "B", "C", "D"]


def test_a_prompt_ends_where_the_assistant_begins(
    encoder: ChatEncoder, as_prompt: Callable[[str], str]
) -> None:
    (ids,) = encoder.prompts([as_prompt("fold")])
    word = encoder.tokenizer("fold", add_special_tokens=False)["input_ids"]
    assert ids == [3, *word, 1, 4]


def test_every_turn_is_rendered(encoder: ChatEncoder) -> None:
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]
    (ids,) = encoder.prompts([json.dumps(turns)])
    assert encoder.tokenizer.decode(ids) == (
        "<|system|>S<|end|><|user|>U<|end|><|assistant|>A<|end|><|user|>V<|end|><|assistant|>"
    )


def test_a_response_is_closed_by_one_end_token(encoder: ChatEncoder) -> None:
    (ids,) = encoder.responses(["fold it"])
    assert ids == [*encoder.tokenizer("fold it", add_special_tokens=False)["input_ids"], 1]


def test_lengths_are_those_of_the_encoded(
    encoder: ChatEncoder, as_prompt: Callable[[str], str]
) -> None:
    prompts = [as_prompt("fold"), as_prompt("the river ends in the lake")]
    assert encoder.prompt_lengths(prompts) == [len(ids) for ids in encoder.prompts(prompts)]
    assert encoder.response_lengths(["a", "b c"]) == [
        len(ids) for ids in encoder.responses(["a", "b c"])
    ]


def test_nothing_encodes_to_nothing(encoder: ChatEncoder) -> None:
    assert encoder.prompts([]) == encoder.responses([]) == []


def test_decoding_drops_special_tokens_and_outer_space(encoder: ChatEncoder) -> None:
    assert encoder.decode(encoder.responses([" fold it ", "你好"])) == ["fold it", "你好"]


def copy_with(
    tokenizer: PreTrainedTokenizerBase, template: str, **specials: str
) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template=template, **specials
    )


def test_the_tokenizers_own_template_is_used(
    tokenizer: PreTrainedTokenizerBase, as_prompt: Callable[[str], str]
) -> None:
    template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}[reply]{% endif %}"
    )
    other = ChatEncoder(copy_with(tokenizer, template, eos_token=END, pad_token=PAD))
    assert other.decode(other.prompts([as_prompt("Hi")])) == ["[user] Hi [reply]"]


def test_plain_template_of_base_models(
    tokenizer: PreTrainedTokenizerBase, as_prompt: Callable[[str], str]
) -> None:
    plain = ChatEncoder(copy_with(tokenizer, PLAIN_TEMPLATE, eos_token=END, pad_token=PAD))
    assert plain.decode(plain.prompts([as_prompt("Hi")])) == ["User: Hi\n\nAssistant:"]


def test_special_tokens_are_not_doubled(as_prompt: Callable[[str], str]) -> None:
    # The template writes the start token; the tokenizer, left alone, would write it again.
    tokenizer = train_tokenizer(TEXTS, vocab_size=280)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", 2)]
    )
    tokenizer.chat_template = "<|system|>{{ messages[0]['content'] }}<|assistant|>"
    encoder = ChatEncoder(tokenizer)
    assert encoder.prompts([as_prompt("a")])[0].count(2) == 1
    assert 2 not in encoder.responses(["a"])[0]


def test_the_end_token_pads_where_there_is_no_pad_token(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoder = ChatEncoder(copy_with(tokenizer, PLAIN_TEMPLATE, eos_token=END))
    assert encoder.pad_token_id == encoder.eos_token_id == 1


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"expected an eos_token, got none"):
        ChatEncoder(copy_with(tokenizer, PLAIN_TEMPLATE))


def test_answers_that_quote_the_end_token_have_one_end(encoder: ChatEncoder) -> None:
    def ends(ids: Sequence[int]) -> int:
        return ids.count(encoder.eos_token_id)

    (ids,) = encoder.responses(["the mark <|end|> closes a turn"])
    assert ends(ids) == 1
