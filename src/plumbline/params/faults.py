"""The faults of an experiment as lines that say where, which key, what was expected, what came."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from plumbline.params.fields import Catalogue, FieldDoc, catalogue, join_words, setting, written
from plumbline.params.tree import Node, find, show

_EXPECTED_OF_FIELD = frozenset(
    {
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "int_type",
        "int_from_float",
        "float_type",
        "bool_type",
        "string_type",
        "string_too_short",
        "string_pattern_mismatch",
        "literal_error",
        "dict_type",
        "list_type",
        "too_short",
    }
)
_NOT_A_SECTION = frozenset({"model_type", "model_attributes_type", "dict_type"})


def explain(error: ValidationError, tree: Node, known: Catalogue | None = None) -> list[str]:
    """Return one line a fault, `ORIGIN: dotted.key: what is wrong`, in the schema's order.

    `known` are the keys of the schema that was broken; those of an experiment if not given.
    """
    faults = error.errors(include_url=False)
    return [_line(fault, tree, known or catalogue()) for fault in faults]


def idle_keys(tree: Node) -> dict[str, str]:
    """Return the keys that are given and have no effect beside the others, with a line for each.

    A key that says its default is given, too: whoever wrote it believes that it acts. What stands
    inside an idle section is not reported again.
    """
    lines: dict[str, str] = {}
    for key, wanted in catalogue().conditions.items():
        node = find(tree, key.split("."))
        if node is None or any(key.startswith(f"{section}.") for section in lines):
            continue
        reasons = (_without_effect(tree, other, values) for other, values in wanted.items())
        if reason := next(filter(None, reasons), None):
            lines[key] = fault_line(node.origin, key, f"{reason}; remove it")
    return lines


def _without_effect(tree: Node, other: str, values: Sequence[object]) -> str | None:
    """Say why a key that acts with some values of another one does not act here."""
    field, node = catalogue().field(other), find(tree, other.split("."))
    options = field.options if field else ()
    value = node.value if node else json.loads(field.default) if field else None
    # A choice that does not exist is a fault of its own, and says nothing of this key.
    if value in values or value not in options:
        return None
    place = node.origin if node else "the default"
    return f"acts only with {setting(other, values)}, and {other} is {written(value)} ({place})"


def fault_line(origin: str, key: str, text: str) -> str:
    """Return a line of a report: `params/a.yaml:3: rl.kl_coef: expected …, got …`."""
    return f"{origin}: {key}: {text}" if key else f"{origin}: {text}"


def _line(fault: Mapping[str, Any], tree: Node, known: Catalogue) -> str:
    path, choice = _without_tag(fault["loc"], known)
    kind = fault["type"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, known.discriminators[".".join(path)])
        return fault_line(_origin(tree, path), ".".join(path), _wrong_tag(path, tree, known))
    key = ".".join(path)
    if kind in ("value_error", "assertion_error"):
        message = str(fault["ctx"]["error"])
        return fault_line(_origins_named(tree, path, message, known), key, message)
    if kind == "extra_forbidden":
        return fault_line(_origin(tree, path), key, _unknown(path, choice, known))
    if path[-1] == "[key]":
        *mapping, name = path[:-1]
        named = _field(tuple(mapping), choice, known)
        expected = named.entries[0] if named and named.entries else fault["msg"]
        text = f"expected each key to be {expected}, got {show(name)}"
        return fault_line(_origin(tree, path), ".".join(mapping), text)
    return fault_line(_origin(tree, path), key, _unexpected(fault, path, choice, known))


def _unexpected(
    fault: Mapping[str, Any], path: tuple[str, ...], choice: str | None, known: Catalogue
) -> str:
    """Say what the schema expects of a value that is missing or wrong."""
    field = _field(path, choice, known)
    got = show(fault["input"])
    if fault["type"] == "missing" and field:
        needed = f" with {choice}" if choice else ""
        return f"required{needed} and not given; expected {field.expected}"
    if fault["type"] in _NOT_A_SECTION and field is None:
        return f"expected a section of keys, got {got}"
    if fault["type"] == "finite_number" and field:
        return f"expected {field.expected} that is finite, got {got}"
    if fault["type"] not in _EXPECTED_OF_FIELD or field is None:
        return f"{fault['msg']}, got {got}"
    quote = fault["type"] == "string_type" and isinstance(fault["input"], bool | int | float)
    return f"expected {field.expected}, got {got}" + ("; put it in quotes" if quote else "")


def _field(path: tuple[str, ...], choice: str | None, known: Catalogue) -> FieldDoc | None:
    """Return the field at a path, or what its mapping expects of an entry."""
    if field := known.field(".".join(path), choice):
        return field
    mapping = known.field(".".join(path[:-1]), choice)
    if mapping and mapping.entries:
        return FieldDoc(".".join(path), mapping.entries[1], "required", mapping.description)
    return None


def _unknown(path: tuple[str, ...], choice: str | None, known: Catalogue) -> str:
    """Say which key an unknown one may stand for."""
    key = ".".join(path)
    if "." in path[-1]:
        return "unknown key; a dotted key is for --set, in a file write the sections as mappings"
    if key == "extends":
        return "only a file extends another; --set cannot"
    if choices := known.choices(key):
        return f"a key of {join_words(choices)}; here it is {choice}"
    if nearest := known.nearest(key, choice):
        return f"unknown key; did you mean {join_words(nearest)}?"
    names = [sibling.rpartition(".")[2] for sibling in known.siblings(key, choice)]
    return f"unknown key; expected one of {', '.join(names)}"


def _wrong_tag(path: tuple[str, ...], tree: Node, known: Catalogue) -> str:
    field = known.field(".".join(path))
    node = find(tree, path)
    got = show(node.value) if node else "nothing"
    return f"expected {field.expected if field else 'a valid choice'}, got {got}"


def _without_tag(
    loc: tuple[int | str, ...], known: Catalogue
) -> tuple[tuple[str, ...], str | None]:
    """Split pydantic's location into the path a user wrote and the choice it went through.

    Pydantic puts the discriminator's value into the location: (model, scratch, layers).
    """
    path = tuple(str(part) for part in loc)
    for section, name in known.discriminators.items():
        depth = len(section.split("."))
        if path[:depth] == tuple(section.split(".")) and len(path) > depth:
            return (*path[:depth], *path[depth + 1 :]), f"{section}.{name}={path[depth]}"
    return path, None


def _origin(tree: Node, path: tuple[str, ...]) -> str:
    """Return where the value was written, or else the section that should hold it."""
    node = tree
    for name in path:
        if name not in node.children:
            break
        node = node.children[name]
    return node.origin


def _origins_named(tree: Node, path: tuple[str, ...], message: str, known: Catalogue) -> str:
    """Return where the keys that the message names below `path` were written."""
    section = find(tree, path)
    prefix = "".join(f"{name}." for name in path)
    named = [
        origin
        for key, origin in (_leaves(section, prefix, known) if section else [])
        if re.search(rf"(?<![\w.]){re.escape(key.removeprefix(prefix))}(?![\w.])", message)
    ]
    return ", ".join(dict.fromkeys(named)) or _origin(tree, path)


def _leaves(node: Node, prefix: str, known: Catalogue) -> Iterator[tuple[str, str]]:
    for name, child in node.children.items():
        if isinstance(child.value, dict) and f"{prefix}{name}" not in known.mappings:
            yield from _leaves(child, f"{prefix}{name}.", known)
        else:
            yield f"{prefix}{name}", child.origin
