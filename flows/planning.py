"""What a run would do, and why, without starting anything."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from flows.wiring import wiring
from plumbline.params.schema import Experiment, StepName
from plumbline.project import Project
from plumbline.refs import DataVersion
from tasks.keys import Ingredients, Pending, cache_key, ingredients
from tasks.records import Record, damage, read_result, records


class Planned(NamedTuple):
    """What would happen to a step."""

    action: Literal["run", "cached", "unknown"]
    because: str


def make_plan(
    project: Project,
    experiment: Experiment,
    data: DataVersion | None,
    refresh: tuple[str, ...] = (),
) -> dict[StepName, Planned]:
    """Say for every step whether it would run.

    "unknown" is a step that waits for another's output: if that comes out byte for byte as in an
    earlier run, the step is cached, too.
    """
    plan: dict[StepName, Planned] = {}
    results: dict[str, Any] = {"data": data or Pending("data")}
    for step, arguments in wiring(experiment).items():
        parts = ingredients(step, arguments(results))
        plan[step] = _plan_step(project, step, parts, plan, refresh)
        results[step] = Pending(step)
        if plan[step].action == "cached":
            results[step] = read_result(project.results, step, cache_key(step, parts))
    return plan


def _plan_step(
    project: Project,
    step: StepName,
    parts: Ingredients,
    plan: Mapping[StepName, Planned],
    refresh: tuple[str, ...],
) -> Planned:
    if step in refresh:
        return Planned("run", "asked for with --refresh")
    past = records(project.home, step)
    if parts.complete:
        result = read_result(project.results, step, cache_key(step, parts))
        if result is None:
            return Planned("run", explain(parts, past))
        broken = damage(result)
        return Planned("run", broken) if broken else Planned("cached", "nothing changed")
    # With other params or code than ever before no output of the earlier steps can help.
    if not any(_could_equal(parts, record.ingredients) for record in past):
        return Planned("run", explain(parts, past))
    waiting = [name for name, planned in plan.items() if planned.action != "cached"]
    return Planned("unknown", f"waits for the output of {waiting[0] if waiting else 'the data'}")


def explain(parts: Ingredients, past: list[Record]) -> str:
    """Name what differs from the most similar earlier run of the step, old value → new value."""
    if not past:
        return "never ran before"
    changes = min((_changes(record.ingredients, parts) for record in past), key=len)
    shown = "; ".join(changes[:3])
    more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
    return shown + more if shown else "its result is gone"


def _changes(old: Ingredients, new: Ingredients) -> list[str]:
    changes = []
    for name in sorted({*old.params, *new.params}):
        before, after = old.params.get(name), new.params.get(name)
        if before != after:
            changes.append(f"{name}: {before} → {after}")
    for name in sorted({*old.inputs, *new.inputs}):
        before, after = old.inputs.get(name), new.inputs.get(name)
        if after is None and name in new.inputs:
            continue
        if before != after:
            changes.append(f"input {name}: {_short(before)} → {_short(after)}")
    modules = [n for n in {*old.code, *new.code} if old.code.get(n) != new.code.get(n)]
    if modules:
        changes.append(
            f"code: {', '.join(sorted(modules)[:3])}" + (" …" if len(modules) > 3 else "")
        )
    return changes


def _could_equal(parts: Ingredients, other: Ingredients) -> bool:
    return (
        parts.params == other.params
        and parts.code == other.code
        and all(v == other.inputs.get(k) for k, v in parts.inputs.items() if v is not None)
    )


def _short(digest: str | None) -> str:
    return digest[:8] if digest else "none"
