"""The loader of experiments: files that extend each other, overrides, and one report of faults."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pydantic import BaseModel, ValidationError

from plumbline.errors import ParamsError
from plumbline.params.faults import explain, fault_line, idle_keys
from plumbline.params.fields import catalogue, describe_fields
from plumbline.params.overrides import Override, as_dict, combine, parse_override
from plumbline.params.schema import Experiment, Params
from plumbline.params.tree import Node, merge, parse, plain, show, without, without_replaced

__all__ = [
    "ExperimentFile",
    "Loaded",
    "describe_fields",
    "find_params",
    "flatten",
    "is_sweep",
    "list_experiments",
    "load_experiment",
]

SWEEP = "sweep"
"""The key that makes a file a sweep."""

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Loaded:
    """An experiment, the files it was read from (its own first), and its overrides by key."""

    name: str
    experiment: Experiment
    sources: tuple[Path, ...]
    overrides: dict[str, object]


@dataclass(frozen=True)
class ExperimentFile:
    """A file of the params folder: its description, or the error that keeps it from loading."""

    name: str
    path: Path
    description: str
    error: str | None = None


def find_params(name_or_path: str, folder: Path) -> Path:
    """Return the file of an experiment, given by its stem in `folder` or by its path.

    Raises:
        ParamsError: There is no such file; the message names the nearest one and lists all.
    """
    given = Path(name_or_path)
    candidates = [folder / f"{name_or_path}.yaml"] if given.name == name_or_path else []
    if given.suffix in (".yaml", ".yml"):
        candidates = [given, folder / given]
    for candidate in candidates if name_or_path else []:
        # os.path.isfile, unlike Path.is_file, takes names that no file can have.
        if os.path.isfile(candidate):
            return candidate
    names = [path.stem for path in params_files(folder)]
    near = get_close_matches(given.stem, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ";"
    there = f"{folder} holds {', '.join(names)}" if names else f"{folder} holds no experiments"
    raise ParamsError(f"no experiment {show(name_or_path)}{hint} {there}")


def list_experiments(folder: Path) -> list[ExperimentFile]:
    """Return the experiments of a folder by name; files whose names begin with _ are bases.

    Sweeps are no experiments (`plumbline.params.sweep.list_sweeps`).

    Raises:
        ParamsError: There is no such folder. A file that does not load is listed with its error.
    """
    listed = []
    for path in params_files(folder):
        if is_sweep(path):
            continue
        try:
            description = load_experiment(str(path), folder).experiment.description
            listed.append(ExperimentFile(path.stem, path, description))
        except ParamsError as error:
            listed.append(ExperimentFile(path.stem, path, "", str(error)))
    return listed


def is_sweep(path: Path) -> bool:
    """Whether a params file declares a sweep; one that can't be read does not."""
    try:
        return SWEEP in read_file(path, str(path)).children
    except ParamsError:
        return False


def load_experiment(name_or_path: str, folder: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read an experiment and everything it extends, lay the overrides on it, and validate it.

    Raises:
        ParamsError: A file cannot be found, read or parsed, or the values do not fit the schema;
            the message has one line a fault: origin, dotted key, expected, got.
    """
    path = find_params(name_or_path, folder)
    tree, sources = _read_chain(path, folder)
    parsed, faults = _parse_overrides(overrides)
    over, more = combine(parsed, tree)
    faults += more
    tree = _lay(tree, over)
    idle = idle_keys(tree)
    faults += idle.values()
    tree = without(tree, idle)
    try:
        experiment = Experiment.model_validate(plain(tree))
    except ValidationError as error:
        faults += explain(error, tree)
    if faults:
        raise ParamsError("\n".join(faults))
    return Loaded(path.stem, experiment, sources, as_dict(parsed))


def flatten(experiment: BaseModel | Mapping[str, object], prefix: str = "") -> dict[str, Scalar]:
    """Return the values by dotted key, below `prefix` where one is given; lists become JSON.

    What the other values make idle is left out: nothing depends on it.
    """
    if isinstance(experiment, BaseModel):
        idle = experiment.idle() if isinstance(experiment, Params) else ()
        experiment = {name: value for name, value in experiment if name not in idle}
    flat: dict[str, Scalar] = {}
    for name, value in experiment.items():
        key = f"{prefix}.{name}" if prefix else name
        if isinstance(value, BaseModel | Mapping):
            flat |= flatten(value, key)
        elif value is None or isinstance(value, str | int | float):
            flat[key] = value
        else:
            flat[key] = json.dumps(value)
    return flat


def params_files(folder: Path) -> list[Path]:
    """Return the YAML files of a folder by name, less those whose names begin with _.

    Raises:
        ParamsError: There is no such folder.
    """
    if not folder.is_dir():
        raise ParamsError(f"no folder {folder}; run this in the project's root")
    found = (path for path in folder.glob("*.yaml") if not path.name.startswith("_"))
    return sorted(path for path in found if path.is_file())


def _read_chain(path: Path, folder: Path) -> tuple[Node, tuple[Path, ...]]:
    """Return the merged tree of a file and of what it extends, and the files, its own first."""
    chain: list[Path] = []
    layers: list[Node] = []
    following: Path | None = path
    while following is not None:
        chain.append(following)
        root = read_file(following, label_of(following, folder))
        if sweep := root.children.get(SWEEP):
            text = "this file is a sweep, not an experiment; run it with"
            command = f"`plumbline sweep {following.stem}`"
            raise ParamsError(fault_line(sweep.origin, SWEEP, f"{text} {command}"))
        extends = root.children.get("extends")
        layers.append(Node({k: v for k, v in root.children.items() if k != "extends"}, root.origin))
        following = _base(extends, chain, folder) if extends else None
    tree = _defaults()
    for layer in reversed(layers):
        tree = _lay(tree, layer)
    return tree, tuple(chain)


def _lay(tree: Node, over: Node) -> Node:
    """Lay a file or the overrides on what they extend."""
    known = catalogue()
    kept = without_replaced(tree, over, known.conditions)
    return merge(kept, over, known.discriminators, known.mappings)


def _base(extends: Node, chain: list[Path], folder: Path) -> Path:
    """Return the file that the last one of the chain extends."""
    if not isinstance(extends.value, str) or not extends.value:
        text = f"expected the name of one file, got {show(extends.value)}"
        raise ParamsError(fault_line(extends.origin, "extends", text))
    base = Path(os.path.normpath(chain[-1].parent / extends.value))
    steps = " -> ".join(label_of(path, folder) for path in (*chain, base))
    if not os.path.isfile(base):
        names = sorted(path.name for path in base.parent.glob("*.yaml"))
        near = get_close_matches(base.name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        text = f"no file {label_of(base, folder)} ({steps}){hint}"
        raise ParamsError(fault_line(extends.origin, "extends", text))
    if any(os.path.samefile(base, path) for path in chain):
        text = f"the files extend each other: {steps}; remove one extends"
        raise ParamsError(fault_line(extends.origin, "extends", text))
    return base


def read_file(path: Path, label: str) -> Node:
    """Return the tree of one file, whose top level is a mapping.

    Args:
        path: Of the file.
        label: How messages name it.

    Raises:
        ParamsError: The file cannot be read, is empty, or is no YAML mapping.
    """
    try:
        raw = path.read_bytes()
        # The mark that some editors put first would otherwise be part of the first key.
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ParamsError(f"{label}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ParamsError(
            f"{label}:{line}: expected UTF-8, got the byte 0x{raw[error.start]:02x}; "
            "save the file as UTF-8"
        ) from None
    tree = parse(text, label)
    if tree is None:
        raise ParamsError(f"{label}: the file is empty; expected keys such as seed: 0")
    if not isinstance(tree.value, dict):
        raise ParamsError(f"{label}: expected keys at the top level, got {show(tree.value)}")
    return tree


def _defaults() -> Node:
    """Return the discriminators' defaults, so that `model: {layers: 2}` needs no source."""
    tree = Node({}, "default")
    flat = flatten(Experiment())
    for section, name in catalogue().discriminators.items():
        node = Node(flat[f"{section}.{name}"], "default")
        for part in reversed([*section.split("."), name]):
            node = Node({part: node}, "default")
        tree = merge(tree, node)
    return tree


def _parse_overrides(texts: Sequence[str]) -> tuple[list[Override], list[str]]:
    parsed, faults = [], []
    for text in texts:
        try:
            parsed.append(parse_override(text))
        except ParamsError as error:
            faults.append(str(error))
    return parsed, faults


def label_of(path: Path, folder: Path) -> str:
    """Return how messages name a file: from the project's root, where it lies inside."""
    absolute = Path(os.path.abspath(path))
    root = Path(os.path.abspath(folder)).parent
    return str(absolute.relative_to(root) if absolute.is_relative_to(root) else absolute)
