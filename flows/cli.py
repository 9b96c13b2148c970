"""The command line: `plumbline run`, `plan`, `compare`, `sweep`, `up`, `data` and more.

Frameworks are imported inside the commands, so that `--help` and `plan` stay quick.
"""

import atexit
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.environment import prepare_environment
from flows.stopping import Terminated, terminable
from plumbline.errors import DataError, MachineError, ParamsError, PlumblineError
from plumbline.params.schema import StepName
from plumbline.project import Project, find_project, make_home

if TYPE_CHECKING:
    from flows.alignment.summary import RunSummary
    from plumbline.params.loader import Loaded
    from plumbline.refs import DataVersion

OK, FAILED, INVALID, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
GO_ON = "the same command goes on from the last checkpoint"

app = typer.Typer(
    help="RLHF as declared, cached, tracked experiments.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Look at the data that data.dvc pins.", no_args_is_help=True)
app.add_typer(data_app, name="data")

out = Console()
err = Console(stderr=True)

Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change a param, e.g. rl.kl_coef=0.1."),
]
ExperimentName = Annotated[str, typer.Argument(help="A file in params/, by name or path.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
Refresh = Annotated[list[str], typer.Option(metavar="STEP", help="Run this step again.")]
Temperature = Annotated[float, typer.Option(min=0.01, help="Divides the logits.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
AllowDirty = Annotated[
    bool, typer.Option("--allow-dirty", help="Accept data that differs from data.dvc.")
]


@app.command()
def run(
    experiment: ExperimentName,
    overrides: Overrides = [],  # noqa: B006  typer reads the default, nobody writes to it
    refresh: Refresh = [],  # noqa: B006
    json_file: JsonFile = None,
    allow_dirty: AllowDirty = False,
    record: Annotated[
        bool, typer.Option("--record", help="Make a tracked run even if nothing is to do.")
    ] = False,
) -> None:
    """Run an experiment; steps whose inputs did not change come from the cache."""
    started = time.perf_counter()
    with _errors_as_exit_codes(), terminable():
        project = _project()
        _check_steps(refresh)
        _check_writable(json_file)
        make_home(project.home)
        loaded, data = _verified(project, experiment, overrides, allow_dirty)
        if not (refresh or record) and (done := _nothing_to_do(project, loaded, data, started)):
            if json_file:
                _write_json(json_file, _as_run_json(done))
            from flows.alignment.closing import show_up_to_date

            show_up_to_date(out, project, done)
            return
        _preflight(project, loaded)
        err.print(f"[bold]{experiment}[/bold]: starting Prefect and MLflow …")
        summary = _align(project, experiment, overrides, refresh, allow_dirty)
        if json_file:
            _write_json(json_file, _as_run_json(summary))
        _show_summary(project, summary)


def _nothing_to_do(
    project: Project, loaded: "Loaded", data: "DataVersion", started: float
) -> "RunSummary | None":
    from flows.alignment.up_to_date import up_to_date

    try:
        return up_to_date(project, loaded, data, started)
    except ParamsError:
        # A key can't be made; the checks before a run say more of the reason.
        return None


def _align(
    project: Project,
    experiment: str,
    overrides: list[str],
    refresh: list[str],
    allow_dirty: bool,
) -> "RunSummary":
    from flows.services.prefect_server import join_server, wait_for_server
    from tasks.sources import read_sources

    join_server(project.home)
    # Before the imports, so that an edit in between is seen.
    read_sources()
    # The server starts beside these imports, which take as long.
    with _uncollected():
        from prefect import tags

        from flows.alignment.flow import align
        from flows.alignment.place import flow_tags
        from flows.stopping import confirm_cancellation
        from tasks.bookkeeping import process_tag

    wait_for_server(project.home)
    try:
        with tags(process_tag(), *flow_tags()):
            return align(experiment, list(overrides), cast(list[StepName], refresh), allow_dirty)
    finally:
        confirm_cancellation()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Import inside: modules stay, and to look for garbage in them takes a quarter of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@app.command()
def plan(
    experiment: ExperimentName,
    overrides: Overrides = [],  # noqa: B006
    refresh: Refresh = [],  # noqa: B006
    json_file: JsonFile = None,
    allow_dirty: AllowDirty = False,
) -> None:
    """Say which steps a run would run, and why; starts nothing."""
    with _errors_as_exit_codes():
        project = _project()
        _check_steps(refresh)
        _check_writable(json_file)
        from flows.alignment.planning import make_plan
        from plumbline.params.loader import find_params, is_sweep, load_experiment
        from tasks.data_version import current_version, pull_missing

        make_home(project.home)
        if is_sweep(find_params(experiment, project.params)):
            _plan_sweep(project, experiment, overrides, refresh, json_file, allow_dirty)
            return
        loaded = load_experiment(experiment, project.params, overrides)
        pull_missing(project.root)
        data = current_version(project.root, loaded.experiment.data.path, allow_dirty=allow_dirty)
        planned = make_plan(project, loaded.experiment, data, refresh)
        if json_file:
            steps = {name: step._asdict() for name, step in planned.items()}
            _write_json(json_file, {"steps": steps})
        table = Table("step", "action", "because", box=None, pad_edge=False)
        colours = {"run": "yellow", "cached": "green", "unknown": "cyan"}
        for name, step in planned.items():
            table.add_row(name, Text(step.action, colours[step.action]), Text(step.because))
        out.print(table)


def _plan_sweep(
    project: Project,
    name: str,
    overrides: list[str],
    refresh: list[str],
    json_file: Path | None,
    allow_dirty: bool,
) -> None:
    from flows.sweeps.planning import plan_sweep, show_plan, verified_data
    from plumbline.params.sweep import load_sweep

    if refresh:
        raise ParamsError(f"--refresh {refresh[0]}: a sweep has no step to refresh; plan a point")
    loaded = load_sweep(name, project.params, overrides)
    planned = plan_sweep(project, loaded, verified_data(project, loaded, allow_dirty=allow_dirty))
    if json_file:
        points = [
            {
                "number": point.number,
                "label": point.label,
                "overrides": point.overrides,
                "steps": {name: s._asdict() for name, s in planned[point.number].items()},
            }
            for point in loaded.points
        ]
        _write_json(json_file, {"points": points})
    show_plan(out, loaded, planned)


@app.command()
def sweep(
    name: Annotated[str, typer.Argument(help="A sweep in params/, by name or path.")],
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change the sweep (sweep.best.metric=judge), or its experiment at every point.",
        ),
    ] = [],  # noqa: B006
    parallel: Annotated[
        int | None, typer.Option(min=1, max=64, help="Points that run at a time.")
    ] = None,
    json_file: JsonFile = None,
    allow_dirty: AllowDirty = False,
    record: Annotated[
        bool, typer.Option("--record", help="Make tracked runs even if nothing is to do.")
    ] = False,
) -> None:
    """Run an experiment at each point of a sweep; steps that points share run once."""
    with _errors_as_exit_codes(), terminable():
        project = _project()
        _check_writable(json_file)
        make_home(project.home)
        from flows.sweeps.command import run_sweep
        from flows.sweeps.summary import show_sweep

        if parallel is not None:
            overrides = [*overrides, f"sweep.parallel={parallel}"]
        done = run_sweep(project, err, name, overrides, allow_dirty=allow_dirty, record=record)
        if json_file:
            _write_json(json_file, done.model_dump(mode="json"))
        show_sweep(out, project, done)
        if done.failed:
            raise typer.Exit(FAILED)


@app.command()
def reproduce(
    run_id: Annotated[str, typer.Argument(help="MLflow's id of a finished pipeline run.")],
    json_file: JsonFile = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the reproduction's folder, whatever it found.")
    ] = False,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Accept a run of edited code; see its commit.")
    ] = False,
) -> None:
    """Make a run again from its commit, params and data, and say what agrees."""
    with _errors_as_exit_codes(), terminable():
        project = _project()
        _check_writable(json_file)
        make_home(project.home)
        from flows.reproducing import agreement
        from flows.reproducing import command as reproducing

        found = reproducing.reproduce(project, run_id, allow_dirty=allow_dirty, keep=keep)
        if json_file:
            _write_json(json_file, found.model_dump(mode="json"))
        agreement.show(out, found)
        if not found.agrees:
            raise typer.Exit(FAILED)


@app.command()
def experiments() -> None:
    """List the experiments and the sweeps in params/."""
    with _errors_as_exit_codes():
        from plumbline.params.loader import list_experiments
        from plumbline.params.sweep import list_sweeps

        folder = _project().params
        for kind, items in (
            ("experiment", list_experiments(folder)),
            ("sweep", list_sweeps(folder)),
        ):
            table = Table(kind, "description", box=None, pad_edge=False)
            for item in items:
                table.add_row(
                    item.name, Text(item.error or item.description, "red" if item.error else "")
                )
            if items:
                out.print(table)


@app.command()
def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            show_default="challenger",
            help="Registered model to load: NAME@ALIAS, NAME/3, or an alias of plumbline-policy.",
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Talk to what `plumbline serve` serves there, and load nothing."),
    ] = None,
    temperature: Temperature = 0.7,
    max_tokens: MaxTokens = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to a trained model; an empty line or Ctrl-D ends."""
    with _errors_as_exit_codes():
        if url and model:
            raise ParamsError(f"expected a model or --url, got both: {model} and {url}")
        _project()
        from flows.markdown import plain

        speaker = "model" if url else model or "plumbline-policy@challenger"
        if url:
            from flows.models.remote_chat import open_remote_chat

            answer = open_remote_chat(
                url, temperature=temperature, max_tokens=max_tokens, seed=seed
            )
        else:
            err.print("[dim]loading …[/dim]")
            from flows.models.chatting import open_chat

            answer = open_chat(speaker, temperature=temperature, max_tokens=max_tokens, seed=seed)
        while True:
            try:
                text = input("you> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                break
            if not text:
                break
            out.print(Text.assemble((f"{speaker}> ", "bold"), plain(answer(text))))


@app.command()
def promote(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHALLENGER", help="NAME@ALIAS, NAME/3, or an alias of plumbline-policy."
        ),
    ] = "challenger",
    threshold: Annotated[
        float,
        typer.Option(
            min=0, max=0.999, help="The lower end of the win rate's interval has to be above it."
        ),
    ] = 0.5,
    ask: Annotated[
        bool, typer.Option("--ask", help="Show the comparison and ask before promoting.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Let a version meet the champion on held-out prompts; if it is better, it takes the place."""
    with _errors_as_exit_codes(), terminable():
        project = _project()
        _check_writable(json_file)
        make_home(project.home)
        from flows.promotion.command import run_promotion

        found = run_promotion(project, err, model, threshold, ask=ask)
        if json_file:
            _write_json(json_file, found.model_dump(mode="json"))
        from flows.promotion.summary import show

        show(out, found, shown=ask and found.approved is not None)
        if found.outcome == "refused":
            raise typer.Exit(FAILED)


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="ALIAS", help="An alias of plumbline-policy, NAME@ALIAS, or NAME/3."
        ),
    ] = "champion",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 5001,
    temperature: Temperature = 0.7,
    max_tokens: MaxTokens = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Serve a model by MLflow's scoring server, for this machine alone, until Ctrl-C."""
    with _errors_as_exit_codes(), terminable():
        make_home(_project().home)
        from flows.models.serving import serve_model

        serve_model(model, port, _say, temperature=temperature, max_tokens=max_tokens, seed=seed)


@data_app.command("check")
def data_check(
    experiment: Annotated[str, typer.Argument(help="Whose data set and limits.")] = "quickstart",
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Validate the data set of an experiment as a run would, and print all that is wrong."""
    with _errors_as_exit_codes():
        project = _project()
        from flows.data.checking import check_data
        from plumbline.params.loader import load_experiment
        from tasks.data_version import pull_missing

        loaded = load_experiment(experiment, project.params, overrides)
        if not (project.root / loaded.experiment.data.path).is_dir():
            pull_missing(project.root)
        rows = check_data(project, loaded.experiment)
        for name, count in rows.items():
            out.print(f"{name}: {count} rows")
        out.print(f"[green]{loaded.experiment.data.path} is valid.[/green]")


@data_app.command("status")
def data_status() -> None:
    """Say which version data.dvc pins, and whether data/ is that version."""
    with _errors_as_exit_codes():
        from tasks.data_version import status

        found = status(_project().root)
        out.print(f"data.dvc: {found['rev']}")
        out.print(f"data/: {found['state']}, {len(found['files'])} files")
        for line in found["differences"]:
            out.print(f"  {line}")


@data_app.command("watch")
def data_watch(
    experiment: Annotated[
        str, typer.Option("--experiment", metavar="EXPERIMENT", help="Whose data to look at.")
    ] = "quickstart",
    ref: Annotated[
        str,
        typer.Option(metavar="REF", help="A git ref, e.g. origin/main, which is fetched first."),
    ] = "",
    again: Annotated[
        bool, typer.Option("--again", help="Start a run also for data that has started one.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Say whether the data differs from what was last trained on; if `up` is on, start a run."""
    with _errors_as_exit_codes():
        project = _project()
        _check_writable(json_file)
        make_home(project.home)
        from flows.watching.command import watch_by_hand

        found = watch_by_hand(project, out, experiment, ref, again=again)
        if json_file:
            _write_json(json_file, found.model_dump(mode="json"))


@data_app.command("import")
def data_import(
    form: Annotated[
        str, typer.Argument(metavar="FORMAT", help="hh-rlhf, sharegpt, alpaca or dpo-pairs.")
    ],
    source: Annotated[
        str, typer.Argument(help="A file (jsonl, json, csv, parquet; .gz), a folder, or a hub id.")
    ],
    to: Annotated[str, typer.Option(metavar="data/NAME", help="The data set to make.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the tables that data/NAME does not have.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Import nothing if any row must be left out.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Hub: commit, tag or branch.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Hub: folder in the data set.")] = None,
    split: Annotated[str | None, typer.Option(help="Hub: which split; train.")] = None,
) -> None:
    """Convert public data to a data set, validate it, and have data.dvc pin it."""
    with _errors_as_exit_codes():
        project = _project()
        make_home(project.home)
        from flows.data.importing import import_data, report
        from plumbline.data.sources import HubOptions

        options = HubOptions(revision, data_dir, split)
        imported = import_data(project, form, source, to, options, merge=merge, strict=strict)
        out.print(report(imported), markup=False, highlight=False, soft_wrap=True)


@app.command("gc")
def collect_garbage(
    keep_last: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Keep what the N newest finished runs use, and all since; else all results stay.",
        ),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is listed.")] = False,
) -> None:
    """List what no kept run refers to; what a registry alias points to always stays."""
    with _errors_as_exit_codes():
        project = _project()
        make_home(project.home)
        from flows.storage.housekeeping import collect, waste_table

        out.print(waste_table(collect(project, keep_last, delete=delete)))
        if not delete:
            out.print("Nothing was removed; [bold]--delete[/bold] removes what is listed.")


@app.command()
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            show_default=False,
            help="Up to 8 finished runs, each by MLflow's id, the beginning of it, or its name; "
            "without any, the 5 newest.",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", metavar="FOLDER", help="Write the report there instead of .plumbline/reports/."
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Lay finished runs side by side: metrics, what differs, reward against KL, samples."""
    with _errors_as_exit_codes():
        project = _project()
        _check_writable(json_file)
        make_home(project.home)
        from flows.comparing.choosing import choose_runs
        from flows.comparing.comparison import compare_runs, curves, read_run
        from flows.comparing.pages import report_folder, show, write_report
        from plumbline.evaluation.frontier import frontier

        folder = report_folder(project, to)
        if not runs:
            err.print("[dim]No run was named; the newest finished ones are compared.[/dim]")
        reads = [read_run(run) for run in choose_runs(runs or ())]
        found = compare_runs(reads)
        write_report(found, frontier(curves(reads), "Reward against KL"), folder)
        if json_file:
            _write_json(json_file, {**json.loads(found.model_dump_json()), "folder": str(folder)})
        show(out, found)
        out.print(f"Report and figure: {folder}", soft_wrap=True, highlight=False)


@app.command()
def verify() -> None:
    """Hash everything that is stored, and name what is not as it was made."""
    with _errors_as_exit_codes():
        project = _project()
        from flows.storage.verifying import show_verified, verify_everything

        found = verify_everything(project)
        show_verified(out, found)
        if found.damaged:
            raise typer.Exit(FAILED)


@app.command()
def up(
    prefect_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Prefect's port; 4200 at first.")
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="MLflow's port; 5000 at first.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Where both listen; at first 127.0.0.1, for this machine.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Start Prefect, MLflow and a worker in the background, and deploy prefect.yaml.

    What is up already stays; what died is started again; a changed prefect.yaml is deployed.
    """
    with _errors_as_exit_codes(), terminable():
        project = _project()
        _check_writable(json_file)
        make_home(project.home)
        from flows.services.status import find_status, named_servers, show_status
        from flows.services.up import Wanted, bring_up

        named = named_servers(project)
        wanted = Wanted(host, {"prefect": prefect_port, "mlflow": mlflow_port})
        bring_up(project, wanted, _say, _warn)
        found = find_status(project, named)
        if json_file:
            _write_json(json_file, found.model_dump(mode="json"))
        show_status(out, found)
        if not found.up:
            raise typer.Exit(FAILED)


@app.command()
def down(json_file: JsonFile = None) -> None:
    """End what `up` started; runs in progress save a checkpoint first."""
    with _errors_as_exit_codes(), terminable():
        project = _project()
        _check_writable(json_file)
        make_home(project.home)
        from flows.services.down import take_down

        ended = take_down(project, _say)
        if json_file:
            _write_json(json_file, ended.model_dump(mode="json"))
        for run in ended.runs:
            out.print(f"stopped the run {run}")
        if ended.killed:
            out.print(f"[yellow]killed[/yellow], since they did not end: {ended.killed}")
        names = ", ".join(ended.services)
        out.print(f"[green]ended[/green]: {names}" if names else "Nothing was up.")


@app.command()
def status(json_file: JsonFile = None) -> None:
    """Say what is up, what is scheduled and which runs are in progress; exits with 0 if all is."""
    with _errors_as_exit_codes():
        project = _project()
        _check_writable(json_file)
        from flows.services.status import find_status, named_servers, show_status

        found = find_status(project, named_servers(project))
        if json_file:
            _write_json(json_file, found.model_dump(mode="json"))
        show_status(out, found)
        if not found.up:
            raise typer.Exit(FAILED)


def _say(text: str) -> None:
    err.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _warn(text: str) -> None:
    err.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)


def _project() -> Project:
    project = find_project()
    prepare_environment(project)
    return project


def _verified(
    project: Project, experiment: str, overrides: list[str], allow_dirty: bool
) -> "tuple[Loaded, DataVersion]":
    """The experiment, and the data as data.dvc pins it."""
    from plumbline.params.loader import load_experiment
    from tasks.data_version import current_version, pull_missing

    loaded = load_experiment(experiment, project.params, overrides)
    pull_missing(project.root)
    path = loaded.experiment.data.path
    return loaded, current_version(project.root, path, allow_dirty=allow_dirty)


def _preflight(project: Project, loaded: "Loaded") -> None:
    """Find what would stop the run, before any server starts."""
    from plumbline.checks import check_experiment, check_tables
    from tasks.disk import check_room
    from tasks.sources import note_functions

    note_functions(loaded.experiment.functions())
    check_experiment(loaded.experiment, project.root)
    check_tables(loaded.experiment, project.root)
    check_room(project.home, loaded.experiment, project.root)


def _check_steps(steps: list[str]) -> None:
    from difflib import get_close_matches

    known = get_args(StepName)
    for step in steps:
        if step not in known:
            near = get_close_matches(step, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ParamsError(f"--refresh {step}: no such step{hint} Steps: {', '.join(known)}")


def _check_writable(path: Path | None) -> None:
    """A result file that can't be written should not cost a run."""
    if path is not None and not (
        path.parent.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
    ):
        raise MachineError(
            f"--json {path}: expected a file that can be written, in a folder that is there"
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def _as_run_json(summary: "RunSummary") -> dict[str, Any]:
    return summary.model_dump(mode="json", exclude={"samples"})


@contextmanager
def _errors_as_exit_codes() -> Iterator[None]:
    """Turn errors that a user can mend into a message and an exit code."""
    try:
        yield
    except (ParamsError, DataError, MachineError) as error:
        _print_error(error)
        raise typer.Exit(INVALID) from None
    except PlumblineError as error:
        _print_error(error)
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        err.print(f"[yellow]interrupted[/yellow]: {GO_ON}")
        raise typer.Exit(INTERRUPTED) from None
    except Terminated:
        err.print(f"[yellow]terminated[/yellow]: {GO_ON}")
        raise typer.Exit(TERMINATED) from None
    except typer.Exit:
        raise
    except Exception:
        err.print_exception(show_locals=False)
        raise typer.Exit(FAILED) from None


def _print_error(error: Exception) -> None:
    err.print("[bold red]error[/bold red] ", end="")
    err.print(str(error), markup=False, highlight=False, soft_wrap=True)


def _show_summary(project: Project, summary: "RunSummary") -> None:
    from flows.alignment.closing import show_summary

    show_summary(out, project, summary)


def main() -> None:
    """Run the command line, and leave at once when all is put away."""
    code = 0

    def leave() -> None:
        # Taking the modules apart takes a second or two, and nothing comes of it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    # Registered first, called last.
    atexit.register(leave)
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


if __name__ == "__main__":
    main()
