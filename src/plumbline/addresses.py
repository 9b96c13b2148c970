"""Addresses in texts that are shown, logged or stored."""

import re

CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+@")


def without_credentials(text: str) -> str:
    """The text, its addresses without user and password."""
    return CREDENTIALS.sub("", text)
