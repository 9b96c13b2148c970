"""What a run would do, and why, without starting anything."""

import json
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from flows.alignment.wiring import wiring
from plumbline.artifacts import DigestCache
from plumbline.params.schema import Experiment, StepName
from plumbline.project import Project
from plumbline.refs import DataVersion, StepResult
from tasks.data_version import current_version, pull_missing
from tasks.keys import Ingredients, Pending, cache_key, digest_cache, ingredients
from tasks.records import Record, damage, read_result, records

ABSENT = object()
"""Stands for a param that the other one of two runs did not have."""
SHOWN = 3
"""Changes, and source files of one change, that are named; the others are counted."""


class Planned(NamedTuple):
    """What would happen to a step."""

    action: Literal["run", "cached", "unknown"]
    because: str


class Finished(NamedTuple):
    """A step that has nothing to do: the key of its result, and the result."""

    key: str
    result: StepResult


def pinned_data(project: Project, experiment: Experiment, *, allow_dirty: bool) -> DataVersion:
    """The experiment's data as data.dvc pins it, pulled where it is missing.

    Raises:
        DataError: it can't be had, or differs.
    """
    pull_missing(project.root)
    return current_version(project.root, experiment.data.path, allow_dirty=allow_dirty)


def make_plan(
    project: Project,
    experiment: Experiment,
    data: DataVersion | None,
    refresh: Collection[str] = (),
) -> dict[StepName, Planned]:
    """Say for every step whether it would run.

    "unknown" is a step that waits for another's output: if that comes out byte for byte as in an
    earlier run, the step is cached, too.
    """
    plan: dict[StepName, Planned] = {}
    results: dict[str, Any] = {"data": data or Pending("data")}
    digest = digest_cache(project)
    for step, make_arguments in wiring(experiment).items():
        arguments = make_arguments(results)
        parts = ingredients(step, arguments)
        results[step] = Pending(step)
        found = _look_up(project, step, parts, digest) if parts.complete else None
        if step in refresh:
            plan[step] = Planned("run", "asked for with --refresh")
        elif isinstance(found, Finished):
            plan[step] = Planned("cached", "nothing changed")
            results[step] = found.result
        elif found:
            plan[step] = Planned("run", found)
        else:
            plan[step] = _explain_step(project, step, parts, arguments)
    digest.save()
    return plan


def finished(
    project: Project, experiment: Experiment, data: DataVersion
) -> dict[StepName, Finished] | None:
    """The results of all steps, where each is there and undamaged; None where any must run."""
    made: dict[StepName, Finished] = {}
    results: dict[str, Any] = {"data": data}
    digest = digest_cache(project)
    for step, make_arguments in wiring(experiment).items():
        found = _look_up(project, step, ingredients(step, make_arguments(results)), digest)
        if not isinstance(found, Finished):
            return None
        made[step] = found
        results[step] = found.result
    digest.save()
    return made


def _look_up(
    project: Project, step: StepName, parts: Ingredients, digest: DigestCache
) -> Finished | str | None:
    """The step's result, or what is wrong with it; None where there is none."""
    key = cache_key(step, parts)
    result = read_result(project.results, step, key)
    return None if result is None else damage(result, digest) or Finished(key, result)


def _explain_step(
    project: Project, step: StepName, parts: Ingredients, arguments: Mapping[str, Any]
) -> Planned:
    past = records(project.home, step)
    # With other params or code than ever before no output of the earlier steps can help.
    if parts.complete or not any(_could_equal(parts, record.ingredients) for record in past):
        return Planned("run", explain(parts, past))
    pending = (value.step for value in arguments.values() if isinstance(value, Pending))
    return Planned("unknown", f"waits for the output of {_listed(dict.fromkeys(pending))}")


def explain(parts: Ingredients, past: list[Record]) -> str:
    """Name what differs from the most similar earlier run of the step, old value → new value.

    Of equally similar ones it is the newest.
    """
    if not past:
        return "never ran before"
    changes = min((_changes(record.ingredients, parts) for record in past), key=len)
    more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return "; ".join(changes[:SHOWN]) + more if changes else "its result is gone"


def _changes(old: Ingredients, new: Ingredients) -> list[str]:
    changes = []
    for name in sorted({*old.params, *new.params}):
        before, after = old.params.get(name, ABSENT), new.params.get(name, ABSENT)
        if before != after or type(before) is not type(after):
            changes.append(f"{name}: {_written(before)} → {_written(after)}")
    for name in sorted({*old.inputs, *new.inputs}):
        pending = name in new.inputs and new.inputs[name] is None
        if not pending and old.inputs.get(name) != new.inputs.get(name):
            changes.append(_change_of_input(name, old.inputs.get(name), new.inputs.get(name)))
    return changes + _changes_of_code(old.code, new.code)


def _change_of_input(name: str, before: str | None, after: str | None) -> str:
    if before is None or after is None:
        return f"{name}: {'gone' if after is None else 'new'}"
    return f"{name}: content {before[:8]} → {after[:8]}"


def _changes_of_code(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """One change for all source files, so that a new checkout does not drown a param's."""
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    libraries = [name for name in names if not _is_digest(old.get(name) or new[name])]
    changes = [f"{name}: {old.get(name, 'none')} → {new.get(name, 'none')}" for name in libraries]
    modules = [name for name in names if name not in libraries]
    if modules:
        changes.append(f"source of {_listed([_module(name, old, new) for name in modules])}")
    return changes


def _module(name: str, old: Mapping[str, str], new: Mapping[str, str]) -> str:
    if name not in old or name not in new:
        return f"{name} ({'new' if name in new else 'gone'})"
    return f"{name} ({old[name][:8]} → {new[name][:8]})"


def _could_equal(parts: Ingredients, other: Ingredients) -> bool:
    return (
        parts.params == other.params
        and parts.code == other.code
        and all(v == other.inputs.get(k) for k, v in parts.inputs.items() if v is not None)
    )


def _is_digest(value: str) -> bool:
    return len(value) == 64


def _written(value: object) -> str:
    """A param as YAML has it."""
    if value is ABSENT:
        return "absent"
    return value if isinstance(value, str) else json.dumps(value)


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown
