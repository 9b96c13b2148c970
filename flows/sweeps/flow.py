"""The flow of a sweep: the points of an experiment, and what they bring out together."""

import json
import logging
import os
import shutil
import time
from contextlib import closing
from functools import partial
from pathlib import Path

from prefect import flow, runtime
from prefect.artifacts import create_markdown_artifact
from rich.console import Console
from rich.text import Text

from flows.alignment.headline import headline_metrics
from flows.alignment.naming import sweep_run_name
from flows.alignment.place import Place, basis_of
from flows.alignment.run_page import as_url, show_links
from flows.services.pages import MlflowPages, mlflow_pages
from flows.stopping import cancellable
from flows.sweeps.planning import Data, check_points, verified_data
from flows.sweeps.points import Outcome, run_points
from flows.sweeps.summary import (
    PointSummary,
    SweepSummary,
    conclude,
    markdown,
    measured,
    summarise,
    table_rows,
)
from plumbline.errors import TrainingError
from plumbline.evaluation.sweep_frontier import sweep_frontier
from plumbline.params.loader import flatten
from plumbline.params.sweep import LoadedSweep, Point, load_sweep
from plumbline.project import Project, find_project, make_home
from tasks import registry, tracking
from tasks.aliases import move_alias, note_version
from tasks.bookkeeping import close_dead_runs
from tasks.data_version import git_state
from tasks.live import live_progress
from tasks.pictures import publish_image
from tasks.progress import quiet_libraries

log = logging.getLogger("plumbline")


class PointsFailed(TrainingError):
    """Some points of a sweep failed; the sweep is complete but for them."""

    def __init__(self, summary: SweepSummary) -> None:
        failed = "; ".join(f"{p.number} ({p.label}): {p.error}" for p in summary.failed)
        super().__init__(
            f"{len(summary.failed)} of {len(summary.points)} points failed: {failed}. The report "
            f"in {summary.report} names their logs; the same command runs them again."
        )
        self.summary = summary


@flow(name="sweep", flow_run_name=sweep_run_name, persist_result=False)
def sweep(
    name: str = "sweep-kl",
    overrides: list[str] | None = None,
    allow_dirty: bool = False,
) -> SweepSummary:
    """Run an experiment at each point of a sweep; steps that points share run once.

    Args:
        name: Name of a sweep in params/.
        overrides: Changes, each as key=value: sweep.parallel=2 to the sweep, rl.episodes=512 to
            its experiment at every point.
        allow_dirty: Accept data that differs from data.dvc, and tag the runs so.
    """
    started = time.perf_counter()
    quiet_libraries()
    project = find_project()
    make_home(project.home)
    loaded = load_sweep(name, project.params, overrides or ())
    data = verified_data(project, loaded, allow_dirty=allow_dirty)
    check_points(project, loaded)
    for registered in dict.fromkeys(point.experiment.registry.name for point in loaded.points):
        registry.check_owner(registered)
    close_dead_runs(project.home)
    flow_run_id = str(runtime.flow_run.id)
    run_name = f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}-{flow_run_id[:4]}"
    folder = project.reports / run_name
    folder.mkdir(parents=True)
    params, tags = _params(loaded), _tags(project, loaded, data, overrides or [], run_name)
    with tracking.sweep_run(run_name, project.home, params, tags) as tracked:
        pages = mlflow_pages(project, tracked.experiment_id)
        show_links(run_name, tracked.run_id, pages)
        with cancellable(flow_run_id):
            ended = _run(project, loaded, data, tracked.run_id, folder, allow_dirty)
        summary = conclude(
            loaded,
            _with_runs(project, tracked.run_id, ended),
            mlflow_run_id=tracked.run_id,
            prefect_flow_run_id=flow_run_id,
            seconds=round(time.perf_counter() - started, 3),
            report=str(folder),
        )
        _record(project, tracked, loaded, summary, folder, pages)
        if summary.failed:
            raise PointsFailed(summary)
    if summary.registered:
        # Last: where it is noted, a sweep with nothing to do says that this one is finished.
        note_version(project.home, **summary.registered, current=tracking.aliased_version)
    return summary


def _params(loaded: LoadedSweep) -> dict[str, object]:
    """What the run in MLflow says that was swept; what the sweep leaves at its default, too."""
    return dict(flatten(loaded.sweep, "sweep"))


def _tags(
    project: Project, loaded: LoadedSweep, data: Data, overrides: list[str], name: str
) -> dict[str, str]:
    tags = {
        "plumbline.sweep": name,
        "plumbline.experiment": loaded.sweep.experiment,
        "plumbline.overrides": json.dumps(overrides),
        "plumbline.varied": ", ".join(loaded.varied),
        "prefect.flow_run_id": str(runtime.flow_run.id),
        **git_state(project.root),
    }
    if len(data) == 1:
        (version,) = data.values()
        tags |= {"data.rev": version.rev, "data.digest": version.digest}
    return tags | {"data.dirty": str(any(one.dirty for one in data.values())).lower()}


def _run(
    project: Project,
    loaded: LoadedSweep,
    data: Data,
    run_id: str,
    folder: Path,
    allow_dirty: bool,
) -> list[PointSummary]:
    """Run the points, and show how far they are."""
    console = Console(stderr=True)

    def tell(words: Text, level: int = logging.INFO) -> None:
        """Say it on the terminal, and on the run's page."""
        console.print(words)
        log.log(level, words.plain)

    if loaded.sweep.parallel > 1 and "OMP_NUM_THREADS" not in os.environ:
        console.print(
            f"{loaded.sweep.parallel} points at a time share {os.cpu_count()} cores, each with as "
            "many threads as a run alone has, so that its results are the same; OMP_NUM_THREADS "
            "set lower is quicker, and changes last digits.",
            style="dim",
        )

    def starting(point: Point) -> Place:
        tell(Text(f"point {point.number} of {len(loaded.points)}, {point.label}: starts"))
        basis = basis_of(point.experiment, data[point.experiment.data.path])
        return Place(run_id, folder.name, point.number, point.label, basis)

    ended: list[PointSummary] = []
    with console.status("") as status, live_progress("sweep", "points") as progress:
        progress.report(0, len(loaded.points))

        def say(words: str) -> None:
            status.update(Text(words, no_wrap=True, overflow="ellipsis"))

        points = run_points(
            project.home, loaded, folder, starting, allow_dirty=allow_dirty, say=say
        )
        # An interruption stops the points at once, wherever it arrives.
        with closing(points):
            for outcome in points:
                ended.append(summarise(outcome))
                failed = outcome.summary is None
                tell(_said(outcome, len(loaded.points)), logging.ERROR if failed else logging.INFO)
                if failed:
                    # It may have been killed.
                    close_dead_runs(project.home)
                progress.report(len(ended), len(loaded.points))
    return ended


def _said(outcome: Outcome, points: int) -> Text:
    name = f"point {outcome.point.number} of {points}, {outcome.point.label}"
    if outcome.summary is None:
        return Text(f"{name}: failed with exit code {outcome.code}; see {outcome.log}", "red")
    ran = [step for step, one in outcome.summary.steps.items() if one.status == "ran"]
    made = f"ran {', '.join(ran)}" if ran else "all cached"
    return Text(f"{name}: finished in {outcome.seconds:.0f} s, {made}", "green")


def _with_runs(project: Project, run_id: str, ended: list[PointSummary]) -> list[PointSummary]:
    """The points with the runs that they made, which a failed one can't tell itself."""
    runs = {
        tags.get("plumbline.point"): (found, tags.get("prefect.flow_run_id"))
        for found, tags in tracking.runs_below(run_id, project.home)
    }
    return [_with_run(point, *runs.get(str(point.number), (None, None))) for point in ended]


def _with_run(point: PointSummary, run: str | None, flow_run: str | None) -> PointSummary:
    found = {"mlflow_run_id": run, "prefect_flow_run_id": flow_run or point.prefect_flow_run_id}
    return point.model_copy(update=found)


def _record(
    project: Project,
    tracked: tracking.StepRun,
    loaded: LoadedSweep,
    summary: SweepSummary,
    folder: Path,
    pages: MlflowPages,
) -> None:
    """Leave what the points brought out together: files, the run in MLflow, the alias."""
    points = measured(summary.points)
    if points:
        title = f"{loaded.sweep.experiment}: {', '.join(loaded.varied)}".rstrip(": ")
        rule = loaded.sweep.best
        picture = sweep_frontier(points, title, best=summary.best, kl_at_most=rule.kl_at_most)
        publish_image(tracked, "frontier", picture)
        shutil.copyfile(tracking.open_uri(tracked.figures["frontier.png"]), folder / "frontier.png")
    _write(folder / "report.md", markdown(summary).encode())
    _write(folder / "sweep.json", (summary.model_dump_json(indent=1) + "\n").encode())
    tracked.table("points", table_rows(summary))
    for file in ("report.md", "sweep.json"):
        tracked.file(folder / file)
    tracked.tag(_outcome_tags(summary))
    if summary.best is not None:
        best = next(point for point in summary.points if point.number == summary.best)
        tracked.finals(headline_metrics(best.metrics))
        made = summary.registered
        point = partial(tracking.point_alias, made["name"], made["alias"], made["version"])
        move_alias(project.home, made["name"], made["alias"], point)
    shown = as_url(folder / "frontier.png") if points else None
    create_markdown_artifact(
        markdown(summary, shown, pages), key="sweep", description=summary.conclusion
    )


def _outcome_tags(summary: SweepSummary) -> dict[str, str]:
    runs = {
        f"plumbline.point.{point.number}": f"{point.mlflow_run_id} ({point.label})"
        for point in summary.points
        if point.mlflow_run_id
    }
    best = next((point for point in summary.points if point.number == summary.best), None)
    chosen = (
        {
            "plumbline.best": best.label,
            "plumbline.best.run_id": str(best.mlflow_run_id),
        }
        if best
        else {"plumbline.best": "none"}
    )
    return {
        **runs,
        **chosen,
        "plumbline.best.rule": summary.rule,
        "plumbline.best.verdict": summary.verdict,
        "plumbline.failed_points": ", ".join(point.label for point in summary.failed),
        "mlflow.note.content": f"{summary.conclusion}\n\nRule: {summary.rule}.",
    }


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    aside.replace(path)
