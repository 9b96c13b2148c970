"""Data sets: `data check`, `data status`, `data watch`, `data import`."""

from typing import Annotated

import typer

from flows.cli.common import JsonFile, Overrides, looking, out, write_json, writing


def check(
    experiment: Annotated[str, typer.Argument(help="Whose data set and limits.")] = "quickstart",
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Validate the data set of an experiment as a run would, and print all that is wrong."""
    with looking() as project:
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


def status() -> None:
    """Say which version data.dvc pins, and whether data/ is that version."""
    with looking() as project:
        from tasks import data_version

        found = data_version.status(project.root)
        out.print(f"data.dvc: {found['rev']}")
        out.print(f"data/: {found['state']}, {len(found['files'])} files")
        for line in found["differences"]:
            out.print(f"  {line}")


def watch(
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
    with writing(json_file) as project:
        from flows.watching.command import watch_by_hand

        found = watch_by_hand(project, out, experiment, ref, again=again)
        write_json(json_file, found.model_dump(mode="json"))


def import_(
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
    with writing() as project:
        from flows.data.importing import import_data, report
        from plumbline.data.sources import HubOptions

        options = HubOptions(revision, data_dir, split)
        imported = import_data(project, form, source, to, options, merge=merge, strict=strict)
        out.print(report(imported), markup=False, highlight=False, soft_wrap=True)
