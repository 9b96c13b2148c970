"""What the schema says of every key, in words: for documentation and for error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from plumbline.params.schema import Experiment, FunctionName, Params

_OTHER_SECTION = 0.25
_ALIKE = 0.6
# What a pattern stands for, where its letters alone would not tell.
_FORMS = {TypeAdapter(FunctionName).json_schema()["pattern"]: "module:function"}


@dataclass(frozen=True)
class FieldDoc:
    """A key of the schema; `choice` is the discriminator's value that it exists for, if any.

    `options` are its values, where there are only a few. `entries` says what the names and the
    values of a mapping are.
    """

    key: str
    expected: str
    default: str
    description: str
    choice: str | None = None
    options: tuple[object, ...] = ()
    entries: tuple[str, str] | None = None


@dataclass(frozen=True)
class Catalogue:
    """Every field and section, and the sections whose fields depend on a discriminator."""

    fields: tuple[FieldDoc, ...]
    sections: tuple[str, ...]
    discriminators: Mapping[str, str]
    conditions: Mapping[str, Mapping[str, Sequence[object]]]
    """Keys that act only where other keys have one of these values."""
    mappings: frozenset[str]
    """Fields whose value is a mapping, with names that the schema does not know."""

    def field(self, key: str, choice: str | None = None) -> FieldDoc | None:
        """Return the field of that key, of the given choice where the key depends on one."""
        for field in self.fields:
            if field.key == key and field.choice in (None, choice):
                return field
        return None

    def choices(self, key: str) -> list[str]:
        """Return the choices of a discriminator that the key exists for."""
        return [field.choice for field in self.fields if field.key == key and field.choice]

    def siblings(self, key: str, choice: str | None = None) -> list[str]:
        """Return the keys that may stand in the section of `key`."""
        section = key.rpartition(".")[0]
        fields = [f.key for f in self.fields if f.choice in (None, choice)]
        return [k for k in (*fields, *self.sections) if k.rpartition(".")[0] == section]

    def nearest(self, key: str, choice: str | None = None) -> list[str]:
        """Return the valid keys most like an unknown one, equally good ones together.

        A key of another section must match better: `rl.batch_size` is nearest to
        `rl.mini_batch_size`, and `kl_coef` at the top is nearest to `rl.kl_coef`.
        """
        siblings = self.siblings(key, choice)
        others = {f.key for f in self.fields} | set(self.sections)
        name = key.rpartition(".")[2]
        scores = {k: _likeness(name, k.rpartition(".")[2]) for k in siblings}
        for other in others - set(siblings):
            if other.rpartition(".")[0] != key.rpartition(".")[0]:
                scores[other] = _likeness(name, other.rpartition(".")[2]) - _OTHER_SECTION
        best = max(scores.values(), default=0.0)
        order = [*(f.key for f in self.fields), *self.sections]
        alike = [k for k in order if best >= _ALIKE and scores.get(k) == best]
        return list(dict.fromkeys(alike))


@cache
def catalogue(params: type[Params] = Experiment) -> Catalogue:
    """Return what a schema holds, read from its JSON schema."""
    schema = params.model_json_schema()
    defaults = {} if "required" in schema else params().model_dump(mode="json")
    rows = list(_walk(schema, schema["$defs"], defaults, ""))
    return Catalogue(
        fields=tuple(row for row in rows if isinstance(row, FieldDoc)),
        sections=tuple(row[0] for row in rows if isinstance(row, tuple)),
        discriminators={row[0]: row[1] for row in rows if isinstance(row, tuple) and row[1]},
        conditions=dict(_conditions(schema, schema["$defs"], "")),
        mappings=frozenset(row.key for row in rows if isinstance(row, FieldDoc) and row.entries),
    )


def describe_fields() -> list[tuple[str, str, str, str]]:
    """Return dotted key, type and range in words, default, and description of every field."""
    described: dict[tuple[str, str, str, str], list[str]] = {}
    for field in catalogue().fields:
        row = (field.key, field.expected, field.default, field.description)
        described.setdefault(row, []).extend([field.choice] if field.choice else [])
    rows = []
    for (key, expected, default, text), choices in described.items():
        wanted = catalogue().conditions.get(key, {})
        needs = [join_words(choices)] if choices else []
        needs += [setting(other, values) for other, values in wanted.items()]
        only = f" Only with {' and '.join(needs)}." if needs else ""
        rows.append((key, expected, default, f"{text}{only}"))
    return rows


def setting(key: str, values: Sequence[object]) -> str:
    """Return the values a key should have as a user writes them: `rl.algorithm=rloo or grpo`."""
    return f"{key}={join_words([written(value) for value in values])}"


def written(value: object) -> str:
    """Return a switch or a choice as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _walk(
    schema: dict[str, Any], defs: dict[str, Any], defaults: Any, prefix: str
) -> Iterator[FieldDoc | tuple[str, str]]:
    """Yield a FieldDoc for every field and (key, discriminator or "") for every section."""
    for name, field in schema.get("properties", {}).items():
        key = f"{prefix}{name}"
        default = defaults.get(name) if isinstance(defaults, dict) else None
        if "$ref" in field:
            yield key, ""
            yield from _walk(_definition(field, defs), defs, default, f"{key}.")
        elif "discriminator" in field:
            discriminator = field["discriminator"]["propertyName"]
            yield key, discriminator
            yield from _walk_choices(field, defs, default or {}, key, discriminator)
        else:
            # A default that a factory makes stands in the dumped experiment alone.
            required = name in schema.get("required", ())
            shown = "required" if required else json.dumps(field.get("default", default))
            yield FieldDoc(
                key,
                _words(field),
                shown,
                field.get("description", ""),
                options=_options(field),
                entries=_entries(field),
            )


def _conditions(
    schema: dict[str, Any], defs: dict[str, Any], prefix: str
) -> Iterator[tuple[str, dict[str, list[object]]]]:
    """Yield every key that acts only under conditions, with these by their keys."""
    for name, field in schema.get("properties", {}).items():
        if "acts_with" in field:
            yield (
                f"{prefix}{name}",
                {f"{prefix}{key}": values for key, values in field["acts_with"].items()},
            )
        if "$ref" in field:
            yield from _conditions(_definition(field, defs), defs, f"{prefix}{name}.")


def _walk_choices(
    field: dict[str, Any], defs: dict[str, Any], default: dict[str, Any], key: str, name: str
) -> Iterator[FieldDoc | tuple[str, str]]:
    definitions = [_definition(variant, defs) for variant in field["oneOf"]]
    variants = {variant["properties"][name]["const"]: variant for variant in definitions}
    meaning = [f"{tag}: {v['properties'][name]['description']}" for tag, v in variants.items()]
    yield FieldDoc(
        f"{key}.{name}",
        join_words(list(variants)),
        json.dumps(default[name]) if name in default else "required",
        " ".join(meaning),
        options=tuple(variants),
    )
    for tag, variant in variants.items():
        for row in _walk(variant, defs, default, f"{key}."):
            if isinstance(row, FieldDoc) and row.key != f"{key}.{name}":
                yield replace(row, choice=f"{key}.{name}={tag}")


def _definition(field: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = defs[field["$ref"].rpartition("/")[2]]
    return found


def _options(field: dict[str, Any]) -> tuple[object, ...]:
    """Return every value of a switch or a choice; nothing for other fields."""
    return (True, False) if field.get("type") == "boolean" else tuple(field.get("enum", ()))


def _entries(field: dict[str, Any]) -> tuple[str, str] | None:
    """Return in words the names and the values of a mapping; None for other fields."""
    if field.get("type") != "object":
        return None
    names = field.get("patternProperties") or {"": field.get("additionalProperties", {})}
    ((pattern, value),) = names.items()
    name = {"type": "string"} | ({"pattern": pattern} if pattern else {})
    return _words(name), _words(value)


def _words(field: dict[str, Any]) -> str:
    """Return the type and range of a field of a JSON schema as a phrase, with its article."""
    if entries := _entries(field):
        return f"a mapping of {entries[0]} to {entries[1]}"
    if "anyOf" in field:
        return " or ".join(_words(part) for part in field["anyOf"])
    if "enum" in field or "const" in field:
        return join_words([str(value) for value in field.get("enum", [field.get("const")])])
    names = {
        "integer": "an integer",
        "number": "a number",
        "boolean": "true or false",
        "string": "a string",
        "array": "a list",
        "null": "null",
    }
    bounds = [
        f"{sign} {field[bound]:.12g}"
        for bound, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", ">="),
            ("exclusiveMaximum", "<"),
            ("maximum", "<="),
        )
        if bound in field
    ]
    words = [names[field["type"]], " and ".join(bounds)]
    if field.get("minItems"):
        words.append("that is not empty")
    if field.get("minLength"):
        words.append("that is not empty" if field["minLength"] == 1 else "that is longer")
    if "pattern" in field:
        form = _FORMS.get(field["pattern"])
        words.append(f"that matches {field['pattern']}" + (f" ({form})" if form else ""))
    return " ".join(word for word in words if word)


def join_words(words: list[str]) -> str:
    """Return a list in prose: `a, b or c`."""
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def _likeness(first: str, second: str) -> float:
    return SequenceMatcher(None, first, second).ratio()
