"""Talking to a registered model that is loaded here."""

from collections.abc import Callable

from plumbline.errors import DataError
from tasks.progress import quiet_libraries
from tasks.registry import full_name
from tasks.talker import Talker


def open_chat(name: str, *, temperature: float, max_tokens: int, seed: int) -> Callable[[str], str]:
    """Load a model; returns a function from a request to an answer.

    Args:
        name: NAME@ALIAS or NAME/NUMBER, or an alias or number of `plumbline-policy`.
        temperature: divides the logits.
        max_tokens: the longest answer.
        seed: of the sampling.

    Raises:
        ParamsError: the registry has no such model.
    """
    quiet_libraries()
    talker = Talker(full_name(name))
    generator = talker.generator(seed)

    def answer(request: str) -> str:
        messages = [{"role": "user", "content": request}]
        try:
            return talker.reply(
                messages, temperature=temperature, max_tokens=max_tokens, generator=generator
            ).text
        except DataError as error:
            return f"({error})"

    return answer
