"""Comparing finished runs: metrics with intervals, what differs, answers to the same prompts."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from flows.comparing.metric_rows import MetricRow, metric_rows, tables_read
from plumbline.evaluation.frontier import RunCurve
from plumbline.params.schema import STEP_NAMES, reward_name
from tasks import past_runs
from tasks.past_runs import PastRun

MARKS = "ABCDEFGH"
CODE = ("git.", "version.", "hardware.")
"""How the tags begin that say what code ran on what."""
SCORES = ("score", "gold", "judge")


class ComparedRun(BaseModel):
    """A run as the head of a column."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    name: str
    experiment: str | None
    commit: str | None
    data_rev: str | None


class Answer(BaseModel):
    """What a run's policy answered, and its scores."""

    model_config = ConfigDict(frozen=True)

    text: str
    scores: dict[str, float]


class Sample(BaseModel):
    """A prompt and every run's answer."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    answers: dict[str, Answer]


Values = dict[str, str | None]
"""What each run has, by its mark; None where it has none."""


class Comparison(BaseModel):
    """What distinguishes some runs."""

    model_config = ConfigDict(frozen=True)

    runs: dict[str, ComparedRun]
    """By mark, which is a letter."""
    notes: list[str]
    """What the reader must know to read the numbers."""
    metrics: dict[str, MetricRow]
    params: dict[str, Values]
    """Those that differ, as are data and code."""
    data: dict[str, Values]
    code: dict[str, Values]
    """Commit, versions and hardware."""
    shared: list[str]
    """Steps of which all runs have the very same result."""
    samples: list[Sample]
    """Prompts that all runs answered, in the first run's order."""


class RunRead(NamedTuple):
    """A run, and what its steps kept."""

    run: PastRun
    history: list[dict[str, float]]
    """The curves of its RL, a row a rollout."""
    samples: list[dict[str, Any]]
    """Rows of its evaluation's table."""


def read_run(run: PastRun) -> RunRead:
    """Read what the steps of a run kept; a step whose files are gone has nothing."""
    rl, evaluation = run.steps.get("rl"), run.steps.get("evaluate")
    return RunRead(
        run,
        past_runs.step_history(rl) if rl else [],
        past_runs.step_table(evaluation, "samples") if evaluation else [],
    )


def compare_runs(reads: Sequence[RunRead]) -> Comparison:
    """Lay runs side by side, in their order; the first is A."""
    read = dict(zip(MARKS, reads, strict=False))
    runs = {mark: r.run for mark, r in read.items()}
    metrics, notes = metric_rows(runs)
    samples = _samples({mark: r.samples for mark, r in read.items()})
    return Comparison(
        runs={mark: _head(run) for mark, run in runs.items()},
        notes=[*notes, *_gaps(read, samples)],
        metrics=metrics,
        params=_differences(runs, _params),
        data=_differences(runs, _data) | _differences(runs, tables_read, only_known=True),
        code=_differences(runs, _code),
        shared=[step for step in STEP_NAMES if _is_shared(step, runs.values())],
        samples=samples,
    )


def curves(reads: Sequence[RunRead]) -> list[RunCurve]:
    """The runs as `plumbline.evaluation.frontier.frontier` draws them."""
    return [
        RunCurve(
            mark, run.name, history, run.metrics,
            f"objective/reward_{reward_name(run.params.get('evaluate.gold', ''))}",
        )
        for mark, (run, history, _) in zip(MARKS, reads, strict=False)
    ]  # fmt: skip


def _head(run: PastRun) -> ComparedRun:
    return ComparedRun(
        run_id=run.run_id,
        name=run.name,
        experiment=run.tags.get("plumbline.experiment"),
        commit=run.tags.get("git.commit"),
        data_rev=run.tags.get("data.rev"),
    )


def _gaps(read: dict[str, RunRead], samples: list[Sample]) -> list[str]:
    """What is missing of a run, or hides a difference."""
    notes = []
    runs = {mark: r.run for mark, r in read.items()}

    def say(text: str, those: Callable[[str], bool]) -> None:
        if marks := [mark for mark in runs if those(mark)]:
            notes.append(f"{', '.join(marks)}: {text}")

    say(
        "files of the commit had been edited, so equal commits may be different code.",
        lambda mark: runs[mark].tags.get("git.dirty") == "true",
    )
    say(
        "no held-out score and KL was logged, so the figure has no point.",
        lambda mark: not {"eval/policy/score", "eval/policy/kl"} <= runs[mark].metrics.keys(),
    )
    say("the evaluation's samples are not kept.", lambda mark: not read[mark].samples)
    if not samples and all(r.samples for r in read.values()):
        notes.append("No prompt was answered by all runs, so there are no samples side by side.")
    return notes


# What differs.


def _differences(
    runs: dict[str, PastRun],
    of: Callable[[PastRun], dict[str, str]],
    *,
    only_known: bool = False,
) -> dict[str, Values]:
    """The names under which the runs have different values; absent counts, unless `only_known`."""
    have = {mark: of(run) for mark, run in runs.items()}
    found = {}
    for name in sorted({name for values in have.values() for name in values}):
        values = {mark: have[mark].get(name) for mark in runs}
        told = {v for v in values.values() if v is not None} if only_known else {*values.values()}
        if len(told) > 1:
            found[name] = values
    return found


def _params(run: PastRun) -> dict[str, str]:
    # What an experiment says of itself acts on nothing.
    return {name: value for name, value in run.params.items() if name != "description"}


def _data(run: PastRun) -> dict[str, str]:
    names = {"data.rev": "data.dvc", "data.digest": "data set", "data.dirty": "edited since"}
    return {label: run.tags[tag] for tag, label in names.items() if tag in run.tags}


def _code(run: PastRun) -> dict[str, str]:
    return {name: value for name, value in run.tags.items() if name.startswith(CODE)}


def _is_shared(step: str, runs: Iterable[PastRun]) -> bool:
    digests = {run.steps[step].digest if step in run.steps else None for run in runs}
    return len(digests) == 1 and None not in digests


# Samples.


def _samples(tables: dict[str, list[dict[str, Any]]]) -> list[Sample]:
    """The prompts that each run's table has once: of one that stands twice, which is which?"""
    answers = {mark: _answers(rows) for mark, rows in tables.items()}
    first = next(iter(answers.values()), {})
    return [
        Sample(prompt=prompt, answers={mark: found[prompt] for mark, found in answers.items()})
        for prompt in first
        if all(prompt in found for found in answers.values())
    ]


def _answers(rows: list[dict[str, Any]]) -> dict[str, Answer]:
    times = Counter(row["prompt"] for row in rows)
    return {
        row["prompt"]: Answer(
            text=row["policy"],
            scores={
                name: value
                for name in SCORES
                if isinstance(value := row.get(f"policy_{name}"), int | float)
            },
        )
        for row in rows
        if times[row["prompt"]] == 1
    }
