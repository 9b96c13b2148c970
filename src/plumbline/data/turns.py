"""Conversations that are longer than the model is given: their oldest turns are left out."""

import json
from collections.abc import Sequence

from plumbline.data.validation import TokenCounter, prompt_lengths
from plumbline.data.values import conversation


def shortened(prompts: Sequence[str], max_tokens: int, counter: TokenCounter) -> dict[str, str]:
    """Cut each prompt over the limit until it fits: from what it was to what is left of it.

    What goes is the oldest user turn with all that follows it up to the next one, so that what
    is left starts with a user's turn; the system prompt stays. Prompts that already fit are left
    out, and so are those that do not fit even with their last user turn alone.
    """
    lengths, _ = prompt_lengths(prompts, counter)
    waiting = {prompt: prompt for prompt, length in lengths.items() if length > max_tokens}
    cut: dict[str, str] = {}
    while waiting:
        shorter = {prompt: without_oldest_turn(rest) for prompt, rest in waiting.items()}
        left = {prompt: rest for prompt, rest in shorter.items() if rest is not None}
        lengths, _ = prompt_lengths(list(dict.fromkeys(left.values())), counter)
        fits = {
            prompt
            for prompt, rest in left.items()
            if lengths.get(rest, max_tokens + 1) <= max_tokens
        }
        cut |= {prompt: left[prompt] for prompt in fits}
        waiting = {prompt: rest for prompt, rest in left.items() if prompt not in fits}
    return cut


def without_oldest_turn(prompt: str) -> str | None:
    """The prompt from its second user turn on, system prompt kept; None if it has only one.

    A prompt that starts with an assistant's turn loses that one first.
    """
    turns = conversation(prompt)
    first = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), 0)
    later = [i for i in range(first + 1, len(turns)) if turns[i]["role"] == "user"]
    if not later:
        return None
    return json.dumps(
        [*turns[:first], *turns[later[0] :]], ensure_ascii=False, separators=(",", ":")
    )
