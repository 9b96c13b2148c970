"""Whether two runs that should be the same are: digest by digest and metric by metric."""

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.alignment.planning import explain
from plumbline.params.schema import STEP_NAMES, StepName
from tasks.past_runs import PastRun, PastStep
from tasks.records import Record, records

CLOSE = 1e-3
"""Metrics that differ relatively by no more than this are called close."""

TIMES = {"perf", "time"}
"""Parts of the names of metrics that tell of the machine, not of the result."""

MACHINE = ("version.", "hardware.")
"""How the tags begin that say what a run ran on."""


class StepAgreement(BaseModel):
    """One step of both runs."""

    model_config = ConfigDict(frozen=True)

    digest: str | None
    reproduced: str | None
    equal: bool
    because: str
    """Why the digests differ, as far as it is known; empty where they agree."""


class MetricAgreement(BaseModel):
    """One final metric of both runs; None where a run has none."""

    model_config = ConfigDict(frozen=True)

    original: float | None
    reproduced: float | None
    agreement: Literal["equal", "close", "different"]
    """To the bit, within a relative difference of 0.001, or neither."""


class Change(BaseModel):
    """A param or a property of the machine that is not what it was."""

    model_config = ConfigDict(frozen=True)

    original: str | None
    reproduced: str | None


class Agreement(BaseModel):
    """What a reproduction found."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    name: str
    commit: str
    data_rev: str
    notes: list[str]
    """What the reader must know of how the run was rebuilt."""
    machine: dict[str, Change]
    """Versions and hardware that are not as they were."""
    params: dict[str, Change]
    """Params that are not as they were: there should be none."""
    steps: dict[str, StepAgreement]
    metrics: dict[str, MetricAgreement]
    left_out: list[str]
    """Metrics that measure time, which is never the same twice."""
    agrees: bool
    """Whether every digest is as it was."""
    folder: str | None = None
    """Where the reproduction is; None where it was removed."""


def compare(
    original: PastRun, reproduced: PastRun, homes: tuple[Path, Path], notes: list[str]
) -> Agreement:
    """Compare a run with its reproduction.

    Args:
        original: the run.
        reproduced: its reproduction.
        homes: the folders for generated files in which each was made, for explanations.
        notes: to be handed on.
    """
    names = [n for n in STEP_NAMES if n in original.steps or n in reproduced.steps]
    steps: dict[str, StepAgreement] = {
        name: _compare_step(name, original.steps.get(name), reproduced.steps.get(name), homes)
        for name in names
    }
    metrics = sorted({*original.metrics, *reproduced.metrics})
    times = [name for name in metrics if TIMES.intersection(name.split("/"))]
    return Agreement(
        run_id=original.run_id,
        name=original.name,
        commit=original.tags["git.commit"],
        data_rev=original.tags["data.rev"],
        notes=notes,
        machine=_changes(_machine(original), _machine(reproduced)),
        params=_changes(original.params, reproduced.params),
        steps=steps,
        metrics={
            name: _compare_metric(original.metrics.get(name), reproduced.metrics.get(name))
            for name in metrics
            if name not in times
        },
        left_out=times,
        agrees=bool(steps) and all(step.equal for step in steps.values()),
    )


def show(console: Console, found: Agreement) -> None:
    """Print what agrees and what does not, the probable reasons first."""
    origin = f", commit {found.commit[:12]}, data {found.data_rev}"
    console.print(Text.assemble((found.name, "bold"), origin), soft_wrap=True)
    for note in found.notes:
        console.print(Text(f"note: {note}", "yellow"), soft_wrap=True)
    if found.machine:
        console.print(
            _changes_table("not as it was, a probable reason for the rest", found.machine)
        )
    if found.params:
        console.print(_changes_table("param", found.params))
    console.print(_steps_table(found))
    _show_metrics(console, found)
    if found.agrees:
        console.print("[green]Reproduced: every digest is as it was.[/green]")
    else:
        first = next((name for name, step in found.steps.items() if not step.equal), "every step")
        console.print(f"[red]Not reproduced: the digests differ from {first} on.[/red]")
    if found.folder:
        console.print(f"The reproduction is in {found.folder}", soft_wrap=True, highlight=False)


def _compare_step(
    name: StepName, original: PastStep | None, other: PastStep | None, homes: tuple[Path, Path]
) -> StepAgreement:
    digest = original.digest if original else None
    reproduced = other.digest if other else None
    equal = digest is not None and digest == reproduced
    return StepAgreement(
        digest=digest,
        reproduced=reproduced,
        equal=equal,
        because="" if equal else _because(name, original, other, homes),
    )


def _because(
    name: StepName, original: PastStep | None, other: PastStep | None, homes: tuple[Path, Path]
) -> str:
    if original is None or other is None:
        return f"only the {'reproduction' if original is None else 'original'} has this step"
    if original.digest is None:
        return "the run that made the original is gone, and its digest with it"
    if original.key is not None and original.key == other.key:
        return "from the same params, inputs and code: the machine or a library computes otherwise"
    old, new = (
        _record(home, name, step) for home, step in zip(homes, (original, other), strict=True)
    )
    if old is None or new is None:
        return "made from other params, inputs or code"
    return explain(new.ingredients, [old])


def _record(home: Path, name: StepName, step: PastStep) -> Record | None:
    return next((record for record in records(home, name) if record.key == step.key), None)


def _compare_metric(original: float | None, reproduced: float | None) -> MetricAgreement:
    agreement: Literal["equal", "close", "different"] = "different"
    if original is not None and reproduced is not None:
        if original == reproduced or (math.isnan(original) and math.isnan(reproduced)):
            agreement = "equal"
        elif math.isclose(original, reproduced, rel_tol=CLOSE):
            agreement = "close"
    return MetricAgreement(original=original, reproduced=reproduced, agreement=agreement)


def _machine(run: PastRun) -> dict[str, str]:
    return {name: value for name, value in run.tags.items() if name.startswith(MACHINE)}


def _changes(old: dict[str, str], new: dict[str, str]) -> dict[str, Change]:
    return {
        name: Change(original=old.get(name), reproduced=new.get(name))
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }


def _changes_table(title: str, changes: dict[str, Change]) -> Table:
    table = Table(title, "then", "now", box=None, pad_edge=False)
    for name, change in changes.items():
        values = (change.original, change.reproduced)
        table.add_row(Text(name), *(Text("–" if v is None else v) for v in values))
    return table


def _steps_table(found: Agreement) -> Table:
    table = Table("step", "digest", "reproduced", "", "because", box=None, pad_edge=False)
    for name, step in found.steps.items():
        verdict = Text("equal", "green") if step.equal else Text("differs", "red")
        digests = (_short(step.digest), _short(step.reproduced))
        table.add_row(name, *digests, verdict, Text(step.because))
    return table


def _show_metrics(console: Console, found: Agreement) -> None:
    by = {
        kind: {k: m for k, m in found.metrics.items() if m.agreement == kind}
        for kind in ("equal", "close", "different")
    }
    console.print(
        f"metrics: {len(by['equal'])} equal to the bit, {len(by['close'])} within {CLOSE:g}, "
        f"{len(by['different'])} different"
        + (f"; left out as times: {', '.join(found.left_out)}" if found.left_out else ""),
        soft_wrap=True,
        highlight=False,
    )
    if not by["close"] and not by["different"]:
        return
    table = Table("metric", "then", "now", "", box=None, pad_edge=False)
    for name, metric in {**by["different"], **by["close"]}.items():
        colour = "red" if metric.agreement == "different" else "yellow"
        values = (_number(metric.original), _number(metric.reproduced))
        table.add_row(name, *values, Text(metric.agreement, colour))
    console.print(table)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.9g}"


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "–"
