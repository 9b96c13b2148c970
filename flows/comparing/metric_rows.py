"""The metrics that runs are compared by: which way is better, and whose values may be compared."""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from tasks.past_runs import PastRun


class Metric(NamedTuple):
    """A row of the table."""

    label: str
    name: str
    better: Literal["higher", "lower"] | None
    """None where neither is: a KL or a length is a price, or a trait."""
    needs: tuple[str, ...] = ()
    """What must be the same in two runs for a comparison of their values: keys of `DIFFERENT`."""
    digits: int = 3
    """Shown after the point."""


METRICS = (
    Metric("gold score", "eval/policy/gold", "higher", ("gold", "prompts")),
    Metric("gain in gold over SFT", "eval/gold_gain", "higher", ("gold", "prompts", "sft")),
    Metric("judge's score", "eval/policy/judge", "higher", ("judge", "prompts")),
    Metric(
        "win rate over SFT by the judge",
        "eval/judge_win_rate",
        "higher",
        ("judge", "prompts", "sft"),
    ),
    Metric("reward-model score", "eval/policy/score", "higher", ("reward_model", "prompts")),
    Metric("win rate over SFT", "eval/win_rate", "higher", ("reward_model", "prompts", "sft")),
    Metric("KL to SFT (nats a response)", "eval/policy/kl", None, ("sft", "prompts")),
    Metric("distinct-2", "eval/policy/distinct_2", "higher", ("prompts",)),
    Metric("length (tokens)", "eval/policy/length_mean", None, digits=1),
    Metric("share that ended by itself", "eval/policy/ended_fraction", "higher", ("prompts",)),
    Metric("reward-model accuracy", "reward_model/accuracy", "higher", ("pairs",)),
    Metric("judge's accuracy", "judge/accuracy", "higher", ("pairs",)),
    Metric("DPO's accuracy, held-out pairs", "dpo/held_out_accuracy", "higher", ("pairs",)),
    Metric("warnings of the monitor", "rl/warnings", "lower", digits=0),
)

DIFFERENT = {
    "gold": ("gold scorers", "their scores are on different scales"),
    "judge": ("judges", "their scores are on different scales"),
    "reward_model": ("reward models", "their scores are on different scales"),
    "sft": ("SFT models", "KL, gains and win rates start from different places"),
    "prompts": ("held-out prompts", "one set may be easier"),
    "pairs": ("preferences", "accuracies are of different pairs"),
}
"""What keeps the values of two runs apart, and why."""


class Estimate(BaseModel):
    """A value and the ends of its 95% interval; null in JSON where it is not a number."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float | None = None
    high: float | None = None


class MetricRow(BaseModel):
    """A metric of all runs."""

    model_config = ConfigDict(frozen=True)

    label: str
    better: Literal["higher", "lower"] | None
    digits: int
    """To show after the point."""
    values: dict[str, Estimate | None]
    """By the runs' marks; None where a run did not log it."""
    best: list[str]
    """Marks of the runs with the best value; none where the values are on different scales."""


def metric_rows(runs: dict[str, PastRun]) -> tuple[dict[str, MetricRow], list[str]]:
    """The metrics that any run has, by name; and why some values may not be compared.

    Args:
        runs: by the letters that they are called by.
    """
    scales = {mark: _scales(run) for mark, run in runs.items()}
    rows = {metric.name: row for metric in METRICS if (row := _row(metric, runs, scales))}
    return rows, _scale_notes(rows, scales)


def tables_read(run: PastRun) -> dict[str, str]:
    """The tables that the steps read, and the digests of their contents."""
    return {
        name: digest
        for step in run.steps.values()
        for name, digest in step.datasets
        if digest != run.tags.get("data.digest")
    }


def _row(
    metric: Metric, runs: dict[str, PastRun], scales: dict[str, dict[str, Any]]
) -> MetricRow | None:
    """A metric of all runs; None where no run has it."""
    values = {mark: _estimate(run.metrics, metric.name) for mark, run in runs.items()}
    known = {mark: found.value for mark, found in values.items() if found}
    if not known:
        return None
    comparable = not any(_differs(key, known, scales) for key in metric.needs)
    return MetricRow(
        label=metric.label,
        better=metric.better,
        digits=metric.digits,
        values=values,
        best=_best(known, metric) if comparable else [],
    )


def _estimate(metrics: dict[str, float], name: str) -> Estimate | None:
    if name not in metrics:
        return None
    low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
    return Estimate(value=metrics[name], low=low, high=high)


def _best(values: dict[str, float], metric: Metric) -> list[str]:
    """The marks of the best value as it is shown; none where all have it, or none is better."""
    shown = {mark: round(v, metric.digits) for mark, v in values.items() if math.isfinite(v)}
    if metric.better is None or len(set(shown.values())) < 2:
        return []
    best = max(shown.values()) if metric.better == "higher" else min(shown.values())
    return [mark for mark, value in shown.items() if value == best]


def _scales(run: PastRun) -> dict[str, Any]:
    """What the values of a run's metrics rest on, by the keys of `DIFFERENT`."""
    digests = {name: step.digest for name, step in run.steps.items()}
    tables = tables_read(run)
    prompts = (tables.get("prompts (evaluation)"), run.metrics.get("eval/prompts"))
    return {
        "gold": run.params.get("evaluate.gold"),
        "judge": digests.get("judge"),
        "reward_model": digests.get("reward_model"),
        "sft": digests.get("sft"),
        "prompts": prompts,
        "pairs": [tables.get(f"{name} (training)") for name in ("preferences", "ratings")],
    }


def _differs(key: str, marks: Iterable[str], scales: dict[str, dict[str, Any]]) -> bool:
    first, *others = (scales[mark][key] for mark in marks)
    return any(other != first for other in others)


def _scale_notes(metrics: dict[str, MetricRow], scales: dict[str, dict[str, Any]]) -> list[str]:
    """Why values are on different scales, and between which runs."""
    notes = []
    for key, (what, why) in DIFFERENT.items():
        names = [metric.name for metric in METRICS if key in metric.needs]
        rows = [metrics[name] for name in names if name in metrics]
        concerned = [mark for mark in scales if any(row.values[mark] for row in rows)]
        if concerned and _differs(key, concerned, scales):
            groups = _groups({mark: scales[mark][key] for mark in concerned})
            notes.append(f"Different {what} ({groups}): {why}; no best value is marked there.")
    return notes


def _groups(values: dict[str, Any]) -> str:
    """The marks, those with equal values together: "A C | B"."""
    groups: list[list[str]] = []
    for mark, value in values.items():
        same = next((group for group in groups if values[group[0]] == value), None)
        if same is None:
            groups.append([mark])
        else:
            same.append(mark)
    return " | ".join(" ".join(group) for group in groups)
