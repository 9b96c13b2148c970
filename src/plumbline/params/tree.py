"""YAML text as a tree whose every value remembers where it was written."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml
from yaml.error import Mark, MarkedYAMLError
from yaml.nodes import MappingNode, ScalarNode, SequenceNode
from yaml.reader import ReaderError

from plumbline.errors import ParamsError


@dataclass(frozen=True)
class Node:
    """A value and its origin: `params/a.yaml:3`, or `--set rl.kl_coef=0.1`.

    A mapping holds nodes; a list or a scalar is held as it is.
    """

    value: object
    origin: str

    @property
    def children(self) -> dict[str, Node]:
        """The nodes below a mapping; empty for everything else."""
        return self.value if isinstance(self.value, dict) else {}


def plain(node: Node) -> object:
    """Return the tree as nested dictionaries, lists and scalars, without the origins."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.children.items()}
    return node.value


def merge(
    base: Node,
    over: Node,
    discriminators: Mapping[str, str] | None = None,
    whole: Collection[str] = (),
    key: str = "",
) -> Node:
    """Lay `over` on `base`: mappings are merged key by key, lists and scalars are replaced.

    `whole` names, by dotted key, the mappings that are one value (`rl.rewards`): they are
    replaced, too, or else what a base puts there could not be taken out again.
    `discriminators` names, by dotted key, the sections whose fields depend on one of them
    (`{"model": "source"}`). Where that one changes, the section of `base` is dropped: its other
    fields belong to the old choice.
    """
    if not isinstance(base.value, dict) or not isinstance(over.value, dict) or key in whole:
        return over
    name = (discriminators or {}).get(key)
    if name in base.children and name in over.children:
        old, new = base.children[name].value, over.children[name].value
        if old != new:
            return over
    merged = dict(base.children)
    for child_key, child in over.children.items():
        if child_key in merged:
            below = f"{key}.{child_key}" if key else child_key
            child = merge(merged[child_key], child, discriminators, whole, below)
        merged[child_key] = child
    return Node(merged, over.origin)


def without_replaced(
    base: Node, over: Node, conditions: Mapping[str, Mapping[str, Sequence[object]]]
) -> Node:
    """Leave out of `base` what `over` makes idle by choosing otherwise, unless it names it, too.

    `conditions` names, by dotted key, what acts only where other keys have one of some values
    (`{"rl.gae_lambda": {"rl.algorithm": ["ppo"]}}`): under `--set rl.algorithm=grpo` a file's
    `gae_lambda` belongs to the old choice. Where `base` had chosen otherwise itself, the key never
    acted: it stays, to be refused where it is written.
    """
    replaced = [
        key
        for key, wanted in conditions.items()
        if _chooses_otherwise(over, wanted) and not _chooses_otherwise(base, wanted)
    ]
    return without(base, replaced)


def _chooses_otherwise(tree: Node, wanted: Mapping[str, Sequence[object]]) -> bool:
    chosen = [(find(tree, key.split(".")), values) for key, values in wanted.items()]
    return any(node is not None and node.value not in values for node, values in chosen)


def without(tree: Node, keys: Iterable[str]) -> Node:
    """Return the tree less what stands at the dotted keys."""
    for key in keys:
        tree = _without(tree, key.split("."))
    return tree


def find(tree: Node, path: Sequence[str]) -> Node | None:
    """Return the node at a path, or None where there is none."""
    node: Node | None = tree
    for name in path:
        node = node.children.get(name) if node else None
    return node


def _without(tree: Node, path: Sequence[str]) -> Node:
    if path[0] not in tree.children:
        return tree
    children = dict(tree.children)
    child = children.pop(path[0])
    if len(path) > 1:
        children[path[0]] = _without(child, path[1:])
    return Node(children, tree.origin)


def show(value: object) -> str:
    """Return a value as an error message quotes it: JSON, cut after 80 characters."""
    if isinstance(value, dict):
        return "a section of keys"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse(text: str, source: str, *, numbered: bool = True) -> Node | None:
    """Read one YAML document by the YAML 1.2 rules for scalars, or None where there is none.

    Args:
        text: The YAML.
        source: The file or the option it stands in, the origin of every value.
        numbered: Add line numbers to the origins.

    Raises:
        ParamsError: The YAML is broken, gives a key twice, or uses a tag or a repeated mapping.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except ReaderError as error:
        before = text[: error.position]
        place = _place(source, before.count("\n"), len(before.rpartition("\n")[2]), numbered)
        found = f"character U+{ord(text[error.position]):04X}"
        raise ParamsError(f"{place}: broken YAML: found {found}, which YAML forbids") from None
    except MarkedYAMLError as error:
        raise ParamsError(_broken(error, text, source, numbered)) from None
    except RecursionError:
        raise ParamsError(f"{source}: broken YAML: nested too deeply") from None
    if root is None:
        return None
    builder = _Builder(loader, source, numbered)
    node = Node(builder.value(root, ""), source)
    if builder.faults:
        raise ParamsError("\n".join(builder.faults))
    return node


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's scalars: 1e-4 is a number; yes, 010 and 1:30 are text."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        # An alias of a collection can nest itself, or grow without bound when it is written out.
        if alias and not isinstance(node, ScalarNode):
            raise MarkedYAMLError(
                problem="an alias may repeat one value only; share sections by extends",
                problem_mark=mark,
            )
        return node


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first
    )
_SCALAR_TAGS = {f"tag:yaml.org,2002:{name}" for name in (*_SCALARS, "str")}
_COLLECTION_TAGS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}


class _Builder:
    """Turns composed YAML into nodes and gathers what is wrong with it."""

    def __init__(self, loader: _Loader, source: str, numbered: bool) -> None:
        self.loader = loader
        self.source = source
        self.numbered = numbered
        self.faults: list[str] = []

    def origin(self, mark: Mark) -> str:
        return f"{self.source}:{mark.line + 1}" if self.numbered else self.source

    def fault(self, mark: Mark, path: str, text: str) -> None:
        key = f"{path}: " if path else ""
        self.faults.append(f"{self.origin(mark)}: {key}{text}")

    def value(self, node: yaml.Node, path: str) -> object:
        if node.tag not in _SCALAR_TAGS | _COLLECTION_TAGS:
            self.fault(node.start_mark, path, f"the tag {node.tag} is not allowed; remove it")
            return None
        if isinstance(node, MappingNode):
            return self.mapping(node, path)
        if isinstance(node, SequenceNode):
            items = [self.value(item, f"{path}.{i}") for i, item in enumerate(node.value)]
            return [_without_origins(item) for item in items]
        try:
            value = self.loader.construct_object(node)
            if isinstance(value, str):
                value.encode()
        except (ValueError, TypeError, KeyError):
            self.fault(node.start_mark, path, "not a value that can be read; put it in quotes")
            return None
        return value

    def mapping(self, node: MappingNode, path: str) -> dict[str, Node]:
        children: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            mark = key_node.start_mark
            key = key_node.value
            if not isinstance(key_node, ScalarNode) or not key or not key.isprintable():
                self.fault(mark, path, f"expected the name of a key, got {_quote(key)}")
                continue
            below = f"{path}.{key}" if path else key
            if key in children:
                again = f", first on line {lines[key]}" if self.numbered else ""
                self.fault(mark, below, f"the key is given twice{again}; remove one of them")
            children[key] = Node(self.value(value_node, below), self.origin(mark))
            lines.setdefault(key, mark.line + 1)
        return children


def _quote(key: object) -> str:
    return ascii(key) if isinstance(key, str) else "a list or a mapping"


def _without_origins(value: object) -> object:
    return plain(Node(value, "")) if isinstance(value, dict) else value


def _place(source: str, line: int, column: int, numbered: bool) -> str:
    return f"{source}:{line + 1}:{column + 1}" if numbered else f"{source}: column {column + 1}"


def _broken(error: MarkedYAMLError, text: str, source: str, numbered: bool) -> str:
    """Return the message for broken YAML: where, what the parser says, and the line it found."""
    mark = error.problem_mark or error.context_mark
    line = mark.line if mark else 0
    place = _place(source, line, mark.column if mark else 0, numbered)
    lines = text.splitlines()
    rest = lines[line].strip() if line < len(lines) else ""
    found = f"found {show(rest)}" if rest else "found the end of the text"
    context = f"{error.context}" if error.context else ""
    if context and error.context_mark and numbered:
        context += f" from line {error.context_mark.line + 1}"
    said = ", ".join(part for part in (context, error.problem) if part)
    return f"{place}: broken YAML: {said}; {found}"
