"""What finished runs brought out: `compare`, `reproduce`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.common import FAILED, JsonFile, err, out, working, write_json, writing


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
    with working(json_file) as project:
        from flows.reproducing import agreement, command

        found = command.reproduce(project, run_id, allow_dirty=allow_dirty, keep=keep)
        write_json(json_file, found.model_dump(mode="json"))
        agreement.show(out, found)
        if not found.agrees:
            raise typer.Exit(FAILED)


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
    with writing(json_file) as project:
        from flows.comparing.choosing import choose_runs
        from flows.comparing.pages import report_folder, show, write_report
        from flows.comparing.runs import compare_runs, curves, read_run
        from plumbline.evaluation.frontier import frontier

        folder = report_folder(project, to)
        if not runs:
            err.print("[dim]No run was named; the newest finished ones are compared.[/dim]")
        reads = [read_run(run) for run in choose_runs(runs or ())]
        found = compare_runs(reads)
        write_report(found, frontier(curves(reads), "Reward against KL"), folder)
        write_json(json_file, {**json.loads(found.model_dump_json()), "folder": str(folder)})
        show(out, found)
        out.print(f"Report and figure: {folder}", soft_wrap=True, highlight=False)
