"""Python functions that the params name: reward functions and gold scorers."""

from collections.abc import Callable
from importlib import import_module

from plumbline.errors import ParamsError

TextScorer = Callable[[str, str], float]
"""Takes a prompt (JSON list of messages) and a response (text); returns a number."""


def split_name(name: str) -> tuple[str, str]:
    """Module and function of `module:function`, which may be written with a dot, too."""
    module, _, function = name.replace(":", ".").rpartition(".")
    return module, function


def load_function(name: str, param: str) -> TextScorer:
    """Import the function that a param names.

    Raises:
        ParamsError: there is no such module or function.
    """
    module, function = split_name(name)
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ParamsError(
            f"{param}: expected module:function that can be imported, got {name!r} ({error})"
        ) from error
    if not callable(found):
        raise ParamsError(f"{param}: expected a function, {name!r} is a {type(found).__name__}")
    scorer: TextScorer = found
    return scorer
