"""What a sweep did, as a value, as a page, and on the terminal."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.alignment.closing import ui_commands
from flows.alignment.summary import RunSummary, StepSummary
from flows.markdown import link, literal, table_row
from flows.services.pages import MlflowPages, flow_run_page
from flows.sweeps.points import Outcome, last_words
from plumbline.evaluation.best import SweepPoint, best_point, rule_in_words, why_no_best
from plumbline.params.sweep import LoadedSweep, Point
from plumbline.project import Project

COLUMNS = {
    "KL": "eval/policy/kl",
    "reward-model score": "eval/policy/score",
    "gold score": "eval/policy/gold",
    "judge's score": "eval/policy/judge",
    "win rate over SFT": "eval/win_rate",
}
"""Of the table of points; a metric that no point has gets none."""
INCOMPARABLE = {
    "sft": "The points have different SFT models: KL and win rate are to each point's own.",
    "reward_model": "The points have different reward models, whose scores are on scales of "
    "their own.",
    "judge": "The points have different judges, whose scores are on scales of their own.",
    "prepare_data": "The points were evaluated on different prompts.",
}
"""What to say where points differ in the output of a step."""


class PointSummary(BaseModel):
    """A point that ended."""

    model_config = ConfigDict(frozen=True)

    number: int
    label: str
    values: dict[str, Any]
    status: Literal["finished", "failed"]
    exit_code: int
    seconds: float
    mlflow_run_id: str | None
    """None where none was made, or where it is not known."""
    prefect_flow_run_id: str | None = None
    steps: dict[str, StepSummary]
    metrics: dict[str, float]
    registered: dict[str, str]
    log: str | None
    error: str | None
    """The last words of a point that failed."""


class SweepSummary(BaseModel):
    """A sweep whose every point has ended."""

    model_config = ConfigDict(frozen=True)

    sweep: str
    experiment: str
    mlflow_run_id: str | None
    """None where nothing was to do, and no run was made."""
    prefect_flow_run_id: str | None
    seconds: float
    points: list[PointSummary]
    rule: str
    """How the best point is chosen, in words."""
    best: int | None
    """Its number; None where no point meets the rule."""
    verdict: str
    """Which it is and with which numbers, or why there is none."""
    notes: list[str]
    """What a reader of the table must know."""
    registered: dict[str, str]
    """Name, version and alias of the best point's model; empty where there is no best."""
    report: str | None
    """Folder of the figure, the report and the logs; None where no run was made."""

    @property
    def conclusion(self) -> str:
        """The verdict as a sentence."""
        among = f" of the {len(self.points) - len(self.failed)} points that finished"
        among = among if self.failed else ""
        if self.best is None:
            return f"There is no best point{among}: {self.verdict}."
        return f"Best point{among}: {self.verdict}."

    @property
    def failed(self) -> list[PointSummary]:
        """The points that did not finish."""
        return [point for point in self.points if point.status == "failed"]


def summarise(outcome: Outcome) -> PointSummary:
    """A point as it ended."""
    if outcome.summary is not None:
        return finished_point(outcome.point, outcome.summary, outcome.seconds, str(outcome.log))
    return PointSummary(
        number=outcome.point.number,
        label=outcome.point.label,
        values=outcome.point.values,
        status="failed",
        exit_code=outcome.code,
        seconds=round(outcome.seconds, 3),
        mlflow_run_id=None,
        steps={},
        metrics={},
        registered={},
        log=str(outcome.log),
        error=last_words(outcome.log) or f"ended with exit code {outcome.code}",
    )


def finished_point(
    point: Point, run: RunSummary, seconds: float, log: str | None = None
) -> PointSummary:
    """A point that finished."""
    return PointSummary(
        number=point.number,
        label=point.label,
        values=point.values,
        status="finished",
        exit_code=0,
        seconds=round(seconds, 3),
        mlflow_run_id=run.mlflow_run_id,
        prefect_flow_run_id=run.prefect_flow_run_id,
        steps=run.steps,
        metrics=run.metrics,
        registered=run.registered,
        log=log,
        error=None,
    )


def conclude(loaded: LoadedSweep, points: Sequence[PointSummary], **facts: Any) -> SweepSummary:
    """The summary of a sweep: the points in order, and the best of them by its rule.

    Args:
        loaded: the sweep.
        points: that ended.
        facts: the other fields of the summary.
    """
    rule = loaded.sweep.best
    found = best_point(measured(points), rule.metric, rule.kl_at_most)
    verdict = why_no_best(measured(points), rule.kl_at_most)
    registered: dict[str, str] = {}
    if found is not None:
        best = next(point for point in points if point.number == found.number)
        metrics = [f"{name} {value}" for name, value in _cells(best).items()]
        verdict = f"{found.label}: {', '.join(metrics)}"
        alias = loaded.points[found.number - 1].experiment.registry.alias
        registered = {**best.registered, "alias": alias}
    return SweepSummary(
        sweep=loaded.name,
        experiment=loaded.sweep.experiment,
        points=sorted(points, key=lambda point: point.number),
        rule=rule_in_words(rule.metric, rule.kl_at_most),
        best=found.number if found else None,
        verdict=verdict,
        notes=_notes(points),
        registered=registered,
        **facts,
    )


def measured(points: Sequence[PointSummary]) -> list[SweepPoint]:
    """The points that have metrics."""
    return [SweepPoint(p.number, p.label, p.metrics) for p in points if p.metrics]


def table_rows(summary: SweepSummary) -> list[dict[str, Any]]:
    """The table of points with numbers as numbers, a dict a row."""
    shown = _shown(summary.points)
    return [
        {
            "point": point.number,
            **{key: point.values.get(key) for key in _keys(summary.points)},
            **{name: point.metrics.get(metric) for name, metric in shown.items()},
            "best": point.number == summary.best,
            "status": point.status,
            "run": point.mlflow_run_id,
        }
        for point in summary.points
    ]


def markdown(
    summary: SweepSummary,
    picture: str | None = "frontier.png",
    pages: MlflowPages | None = None,
) -> str:
    """The sweep on a page: the best point, the figure, the table, what failed.

    Args:
        summary: the sweep.
        picture: address of the figure; None leaves it out.
        pages: addresses in MLflow; with them the page, which is Prefect's, links to the points.
    """
    experiment = literal(summary.experiment)
    lines = [f"# {literal(summary.sweep)}", "", f"{len(summary.points)} points of {experiment}."]
    lines += ["", f"**Rule**: {summary.rule}.", "", f"**{literal(summary.conclusion)}**", ""]
    if picture and measured(summary.points):
        lines += [f"![scores against KL]({picture})", ""]
    shown = _shown(summary.points)
    header = ["", "point", *shown, "seconds", "status", *(["open"] if pages else [])]
    numbers_at = len(shown) + 1
    last = len(header) - numbers_at - 2
    lines += [table_row(*header)]
    lines += [table_row(*["---"] * 2, *["---:"] * numbers_at, *["---"] * last)]
    for point in summary.points:
        cells = _cells(point)
        label = literal(point.label)
        name = f"**{label}**" if point.number == summary.best else label
        numbers = [cells.get(column, "") for column in shown]
        status = "best" if point.number == summary.best else point.status
        links = [_links(point, pages)] if pages else []
        row = [str(point.number), name, *numbers, f"{point.seconds:.0f}", status, *links]
        lines.append(table_row(*row))
    lines += ["", "Estimates on held-out prompts, with their 95% intervals; KL in nats a response."]
    lines += ["", *summary.notes] if summary.notes else []
    if summary.failed:
        lines += ["", "| failed | exit code | last words | log |", "|---|---:|---|---|"]
        lines += [
            table_row(
                f"{p.number}: {literal(p.label)}", str(p.exit_code), _code(p.error), _code(p.log)
            )
            for p in summary.failed
        ]
    if pages:
        lines += ["", *_ways_on(summary, pages)]
    return "\n".join(lines) + "\n"


def _links(point: PointSummary, pages: MlflowPages) -> str:
    """Where a point's run is in Prefect and in MLflow, as far as it has one."""
    flow_run, run = point.prefect_flow_run_id, point.mlflow_run_id
    links = [link("flow run", flow_run_page(flow_run))] if flow_run else []
    return " · ".join([*links, *([link("MLflow", pages.run(run))] if run else [])])


def _ways_on(summary: SweepSummary, pages: MlflowPages) -> list[str]:
    assert summary.mlflow_run_id is not None
    lines = [f"- {link('The sweep in MLflow', pages.run(summary.mlflow_run_id))}"]
    if summary.registered:
        name, version = summary.registered["name"], summary.registered["version"]
        alias = summary.registered["alias"]
        shown = link(f"{name} version {version}", pages.version(name, version))
        lines.append(
            f"- {shown}, alias {alias}, the best point's; talk to it: `plumbline chat "
            f"{name}@{alias}`"
        )
    return [*lines, *([f"- {pages.how_to_open}"] if pages.how_to_open else [])]


def show_sweep(console: Console, project: Project, summary: SweepSummary) -> None:
    """Print the table of points, the best one, what failed and where its log is."""
    if summary.mlflow_run_id is None:
        console.print(
            f"[green]Nothing to do[/green]: all {len(summary.points)} points of "
            f"[bold]{summary.sweep}[/bold] are up to date. `plumbline sweep {summary.sweep} "
            "--record` makes a tracked run all the same."
        )
    shown = _shown(summary.points)
    table = Table(title="Held-out prompts", box=None, pad_edge=False)
    table.add_column()
    table.add_column("point", no_wrap=True)
    for name in (*shown, "ran", "s"):
        # Where a terminal is too narrow for the lines, their words are whole at least.
        table.add_column(name, min_width=max(map(len, name.split())))
    for point in summary.points:
        ran = ", ".join(name for name, step in point.steps.items() if step.status == "ran")
        cells = _cells(point)
        table.add_row(
            str(point.number),
            _label(point, best=point.number == summary.best),
            *(cells.get(column, "") for column in shown),
            ran if point.status == "finished" else "",
            f"{point.seconds:.0f}",
        )
    console.print(table)
    console.print(f"[bold]Rule[/bold]: {summary.rule}.", highlight=False)
    console.print(Text(summary.conclusion, "bold"), highlight=False)
    for note in summary.notes:
        console.print(Text(note, "yellow"))
    for point in summary.failed:
        console.print(Text(f"point {point.number} ({point.label}) failed: {point.error}", "red"))
        console.print(f"  its log: {point.log}", markup=False, highlight=False, soft_wrap=True)
    if summary.registered:
        name, alias = summary.registered["name"], summary.registered["alias"]
        console.print(
            f"[bold]Registered[/bold]: {name}@{alias} is version {summary.registered['version']}, "
            f"the best point's; talk to it: plumbline chat {name}@{alias}",
            highlight=False,
        )
    if summary.report is not None:
        console.print(f"[bold]Figure, report and logs[/bold] in {summary.report}", soft_wrap=True)
    console.print("[bold]Look closer:[/bold]")
    for name, command in ui_commands(project).items():
        console.print(f"  {name}: {command}", soft_wrap=True, highlight=False)


def _label(point: PointSummary, *, best: bool) -> Text:
    label = Text(point.label, "bold" if best else "")
    if best:
        label.append("\nbest", "green")
    elif point.status == "failed":
        label.append("\nfailed", "red")
    return label


def _notes(points: Sequence[PointSummary]) -> list[str]:
    notes = []
    for step, note in INCOMPARABLE.items():
        digests = {point.steps[step].digest for point in points if step in point.steps}
        if len(digests) > 1:
            notes.append(note)
    return notes


def _shown(points: Sequence[PointSummary]) -> dict[str, str]:
    known = {metric for point in points for metric in point.metrics}
    return {name: metric for name, metric in COLUMNS.items() if metric in known}


def _keys(points: Sequence[PointSummary]) -> list[str]:
    return list(dict.fromkeys(key for point in points for key in point.values))


def _cells(point: PointSummary) -> dict[str, str]:
    """The metrics of a point as the table shows them: "estimate [low, high]"."""
    cells = {}
    for name, metric in COLUMNS.items():
        if metric in point.metrics:
            ends = [point.metrics.get(f"{metric}_{end}") for end in ("low", "high")]
            interval = "" if None in ends else f" [{ends[0]:.2f}, {ends[1]:.2f}]"
            cells[name] = f"{point.metrics[metric]:.2f}{interval}"
    return cells


def _code(text: str | None) -> str:
    """A text in a cell, as code."""
    shown = " ".join((text or "").split())
    return f"`{shown.replace('`', chr(39)).replace('|', chr(92) + '|')}`"
