"""Markdown, and text for the terminal, in which nothing that models or users wrote is obeyed."""

import re

from rich.text import Text

SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#!|~&$])")


def plain(text: str) -> Text:
    """What a model said, as it is: no markup, and no control character that the terminal obeys."""
    return Text("".join(c if c.isprintable() or c == "\n" else "�" for c in text))


def table_head(*heads: str, right: int = 0) -> tuple[str, str]:
    """The head of a table whose last columns are numbers."""
    left = len(heads) - right
    return table_row(*heads), f"|{'---|' * left}{'---:|' * right}"


def table_row(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def literal(text: str) -> str:
    """A text with nothing in it that Markdown or HTML would obey, on one line."""
    escaped = SPECIAL.sub(r"\\\1", str(plain(text)))
    return "<br>".join(part.strip() for part in escaped.splitlines())


def link(text: str, address: str) -> str:
    """A link; the text is taken as it is."""
    return f"[{literal(text)}]({address})"
