"""Overrides from the command line: `--set rl.kl_coef=0.1`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from plumbline.errors import ParamsError
from plumbline.params.faults import fault_line
from plumbline.params.fields import catalogue
from plumbline.params.tree import Node, merge, parse, plain, show

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")


@dataclass(frozen=True)
class Override:
    """One `--set`: its dotted key and its value with the text it was written as."""

    key: str
    node: Node


def parse_override(text: str) -> Override:
    """Read `a.b=c`; the value is YAML: `1e-4`, `true`, `[1, 2]`, `"text"`.

    Raises:
        ParamsError: No `=`, no dotted key before it, or broken YAML after it.
    """
    origin = f"--set {text.encode(errors='backslashreplace').decode()}"
    key, equals, value = text.partition("=")
    if not equals or not _KEY.fullmatch(key):
        lacks = "no =" if not equals else f"the key {show(ascii(key)[1:-1])}"
        raise ParamsError(
            fault_line(origin, "", f"expected KEY=VALUE such as rl.kl_coef=0.1, got {lacks}")
        )
    node = parse(value, origin, numbered=False)
    return Override(key, node or Node(None, origin))


def combine(overrides: Sequence[Override], base: Node) -> tuple[Node, list[str]]:
    """Return the overrides as one tree to lay on `base`, and a line for each that cannot be.

    They act together, so their order matters only where one key is set twice: the last one wins.
    """
    combined = Node({}, base.origin)
    faults = []
    for override in overrides:
        parents = override.key.split(".")[:-1]
        blocked = [
            parent
            for parent in (".".join(parents[: i + 1]) for i in range(len(parents)))
            if _holds_value(combined, parent) or _holds_value(base, parent) or _is_field(parent)
        ]
        if blocked:
            text = f"{blocked[0]} holds a value, not a section; set {blocked[0]} itself"
            faults.append(fault_line(override.node.origin, override.key, text))
            continue
        node = override.node
        for name in reversed(override.key.split(".")):
            node = Node({name: node}, override.node.origin)
        combined = merge(combined, node, whole=catalogue().mappings)
    return Node(combined.value, base.origin), faults


def as_dict(overrides: Sequence[Override]) -> dict[str, object]:
    """Return the overrides as values by dotted key."""
    return {override.key: plain(override.node) for override in overrides}


def _holds_value(tree: Node, key: str) -> bool:
    node = tree
    for name in key.split("."):
        if name not in node.children:
            return False
        node = node.children[name]
    return not isinstance(node.value, dict)


def _is_field(key: str) -> bool:
    return any(field.key == key for field in catalogue().fields)
