"""Sweeps: an experiment at several points, each a choice of some of its params."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from plumbline.errors import ParamsError
from plumbline.params.faults import explain, fault_line
from plumbline.params.fields import catalogue
from plumbline.params.loader import (
    SWEEP,
    ExperimentFile,
    find_params,
    flatten,
    is_sweep,
    label_of,
    load_experiment,
    params_files,
    read_file,
)
from plumbline.params.overrides import Override, parse_override
from plumbline.params.schema import Experiment, Params, Positive
from plumbline.params.tree import Node, find, merge, parse, plain, without

MOST_POINTS = 100
LABEL_CHARACTERS = 24
"""Longer values are cut in a point's label."""

Key = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]
"""A dotted key of an experiment."""
Metric = Literal["gold", "judge", "score", "win_rate"]


class BestParams(Params):
    """Which point is the best: the highest metric within a KL budget."""

    metric: Metric = Field(
        "gold",
        description="Of the policy on held-out prompts. gold: gold score. judge: the judge's "
        "score. score: the reward model's own. win_rate: over the SFT model, by the reward model.",
    )
    kl_at_most: Positive | None = Field(
        10.0,
        description="Points with a larger KL to the SFT model are left out; null: none are. Nats "
        "a response.",
    )


class SweepParams(Params):
    """An experiment, the points at which it runs, and how."""

    experiment: Annotated[str, Field(min_length=1)] = Field(
        description="The experiment that every point changes: a file in params/."
    )
    grid: dict[Key, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="Dotted keys to their values; a point is each combination, the last key "
        "varying fastest.",
    )
    points: list[dict[Key, Any]] = Field(
        default_factory=list, description="The points themselves: dotted keys to values."
    )
    parallel: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Points that run at a time, each in a process of its own."
    )
    best: BestParams = Field(default_factory=lambda: BestParams(), description="The best point.")

    @model_validator(mode="after")
    def _grid_or_points(self) -> Self:
        if bool(self.grid) == bool(self.points):
            given = "both" if self.grid else "neither"
            raise ValueError(f"expected one of grid and points, which say what runs; got {given}")
        size = prod(map(len, self.grid.values())) if self.grid else len(self.points)
        if size > MOST_POINTS:
            factors = " × ".join(str(len(values)) for values in self.grid.values())
            raise ValueError(
                f"expected at most {MOST_POINTS} points, got {f'{factors} = ' if factors else ''}"
                f"{size}; sweep in several steps"
            )
        return self


class SweepFile(Params):
    """What a file of a sweep holds."""

    description: str = Field("", description="One line on what the sweep shows.")
    sweep: SweepParams = Field(description="The sweep.")


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    number: int
    """From 1."""
    values: dict[str, Any]
    """What it sets, by dotted key."""
    label: str
    """What it sets that not all points set alike."""
    overrides: tuple[str, ...]
    """Each KEY=VALUE, as `plumbline run EXPERIMENT --set` takes it; the sweep's own come first."""
    experiment: Experiment


@dataclass(frozen=True)
class LoadedSweep:
    """A sweep whose every point is a valid experiment."""

    name: str
    description: str
    sweep: SweepParams
    points: tuple[Point, ...]
    varied: tuple[str, ...]
    """The dotted keys in which the points differ."""


def load_sweep(name_or_path: str, folder: Path, overrides: Sequence[str] = ()) -> LoadedSweep:
    """Read a sweep, lay the overrides on it, and resolve every point.

    Args:
        name_or_path: Of a file in `folder`.
        folder: Holds the sweep and its experiment.
        overrides: Each KEY=VALUE; keys that begin with `sweep.` change the sweep (one list of its
            grid is `sweep.grid.rl.kl_coef=[0, 0.1]`), the others its experiment at every point.

    Raises:
        ParamsError: The file is no sweep, or a point is no experiment; the message has one line a
            fault, those of a point with its number and what it sets.
    """
    path = find_params(name_or_path, folder)
    label = label_of(path, folder)
    tree = read_file(path, label)
    if SWEEP not in tree.children:
        raise ParamsError(
            f"{label}: this file is an experiment, not a sweep, which has the key {SWEEP}; run it "
            f"with `plumbline run {path.stem}`"
        )
    own = [text for text in overrides if text.startswith(f"{SWEEP}.")]
    tree, file = _validated(tree, own)
    chosen = file.sweep
    origin = _origin(tree, "sweep.experiment")
    try:
        find_params(chosen.experiment, folder)
    except ParamsError as error:
        raise ParamsError(fault_line(origin, "sweep.experiment", str(error))) from None
    settings = [dict(values) for values in chosen.points] or [
        dict(zip(chosen.grid, values, strict=True)) for values in product(*chosen.grid.values())
    ]
    common = tuple(text for text in overrides if text not in own)
    points = _resolve(chosen.experiment, settings, common, folder, label)
    faults = _overridden(common, settings)
    faults += _faults_of_the_whole(points, chosen.best, tree, label)
    if faults:
        raise ParamsError("\n".join(faults))
    return LoadedSweep(path.stem, file.description, chosen, points, _varied(settings))


def list_sweeps(folder: Path) -> list[ExperimentFile]:
    """Return the sweeps of a folder by name, with the number of points, or with their error."""
    listed = []
    for path in filter(is_sweep, params_files(folder)):
        try:
            found = load_sweep(str(path), folder)
            what = f"{found.sweep.experiment} at {len(found.points)} points of "
            what += ", ".join(found.varied) if found.varied else "nothing that varies"
            text = f"{what}: {found.description}" if found.description else what
            listed.append(ExperimentFile(path.stem, path, text))
        except ParamsError as error:
            listed.append(ExperimentFile(path.stem, path, "", str(error)))
    return listed


def override_text(key: str, value: Any) -> str:
    """Return KEY=VALUE that `--set` reads back as the same value."""
    if isinstance(value, str) and _reads_back(value):
        return f"{key}={value}"
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _validated(tree: Node, overrides: Sequence[str]) -> tuple[Node, SweepFile]:
    faults = []
    for text in overrides:
        try:
            tree = _lay(tree, parse_override(text))
        except ParamsError as error:
            faults.append(str(error))
    if extends := tree.children.get("extends"):
        text = "a sweep extends no file; sweep.experiment names the experiment that it varies"
        faults.append(fault_line(extends.origin, "extends", text))
        tree = without(tree, ["extends"])
    try:
        file = SweepFile.model_validate(plain(tree))
    except ValidationError as error:
        faults += explain(error, tree, catalogue(SweepFile))
    if faults:
        raise ParamsError("\n".join(faults))
    return tree, file


def _lay(tree: Node, override: Override) -> Node:
    path = override.key.split(".")
    if path[1] == "grid" and len(path) > 2:
        path[2:] = [".".join(path[2:])]
    # One stands in place of the other.
    for chosen, other in (("grid", "points"), ("points", "grid")):
        if path[1] == chosen:
            tree = without(tree, [f"{SWEEP}.{other}"])
    node = override.node
    for name in reversed(path):
        node = Node({name: node}, override.node.origin)
    return merge(tree, node, whole={override.key})


def _resolve(
    experiment: str,
    settings: Sequence[dict[str, Any]],
    common: tuple[str, ...],
    folder: Path,
    label: str,
) -> tuple[Point, ...]:
    """Load the experiment at every point; what is wrong at all of them is reported once."""
    names = _labels(settings)
    points: list[Point] = []
    faults: dict[str, list[int]] = {}
    for number, (values, name) in enumerate(zip(settings, names, strict=True), 1):
        overrides = (*common, *(override_text(key, value) for key, value in values.items()))
        try:
            loaded = load_experiment(experiment, folder, overrides)
            points.append(Point(number, values, name, overrides, loaded.experiment))
        except ParamsError as error:
            for line in str(error).splitlines():
                faults.setdefault(line, []).append(number)
    if not faults:
        return tuple(points)
    lines = []
    for line, numbers in faults.items():
        if len(numbers) == len(settings) > 1:
            lines.append(f"{label}: every point: {line}")
        else:
            lines += [f"{label}: point {n} ({names[n - 1]}): {line}" for n in numbers]
    raise ParamsError("\n".join(lines))


def _overridden(common: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each override that no point would follow, since all say otherwise."""
    everywhere = set.intersection(*(set(values) for values in settings))
    named = {text: parse_override(text).key for text in common}
    return [
        fault_line(f"--set {text}", key, f"every point sets it; set sweep.grid.{key}=[…] instead")
        for text, key in named.items()
        if key in everywhere
    ]


def _faults_of_the_whole(
    points: Sequence[Point], best: BestParams, tree: Node, label: str
) -> list[str]:
    faults = []
    seen: dict[str, Point] = {}
    for point in points:
        whole = json.dumps(flatten(point.experiment), sort_keys=True)
        if first := seen.get(whole):
            faults.append(
                f"{label}: points {first.number} ({first.label}) and {point.number} "
                f"({point.label}) are the same experiment; remove one"
            )
        seen.setdefault(whole, point)
    for point in points:
        given = {"gold": point.experiment.evaluate.gold, "judge": point.experiment.evaluate.judge}
        if not given.get(best.metric, True):
            needed = {"gold": "a scorer in evaluate.gold", "judge": "evaluate.judge=true"}
            text = (
                f"{best.metric} needs {needed[best.metric]}, which point {point.number} "
                f"({point.label}) lacks; set it, or choose score or win_rate"
            )
            faults.append(fault_line(_origin(tree, "sweep.best.metric"), "sweep.best.metric", text))
            break
    return faults


def _varied(settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    keys = dict.fromkeys(key for values in settings for key in values)
    return tuple(key for key in keys if len({_written(values, key) for values in settings}) > 1)


def _written(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], sort_keys=True) if key in values else ""


def _labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each point sets of what varies, by the last part of its key where that is enough."""
    varied = _varied(settings) or tuple(dict.fromkeys(k for values in settings for k in values))
    last = [key.rpartition(".")[2] for key in varied]
    short = {
        key: key if last.count(end) > 1 else end for key, end in zip(varied, last, strict=True)
    }
    labels = []
    for values in settings:
        parts = [f"{short[key]}={_shown(values[key])}" for key in varied if key in values]
        labels.append(", ".join(parts) or "as it is")
    return labels


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= LABEL_CHARACTERS else f"{text[: LABEL_CHARACTERS - 1]}…"


def _reads_back(text: str) -> bool:
    try:
        node = parse(text, "value", numbered=False)
    except ParamsError:
        return False
    return node is not None and node.value == text


def _origin(tree: Node, key: str) -> str:
    """Where a key was written, or else the section that should hold it."""
    path = key.split(".")
    for end in range(len(path), -1, -1):
        if node := find(tree, path[:end]):
            return node.origin
    return tree.origin
