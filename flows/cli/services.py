"""Servers and workers: `up`, `down`, `status`."""

from typing import Annotated

import typer

from flows.cli.common import FAILED, JsonFile, looking, out, say, warn, working, write_json


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
    name: Annotated[
        list[str] | None,
        typer.Option(help="A name that both are called by as well, of a proxy for example."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Start Prefect, MLflow and a worker in the background, and deploy prefect.yaml.

    What is up already stays; what died is started again; a changed prefect.yaml is deployed.
    """
    with working(json_file) as project:
        from flows.services.status import find_status, named_servers, show_status
        from flows.services.up import Wanted, bring_up

        named = named_servers(project)
        ports = {"prefect": prefect_port, "mlflow": mlflow_port}
        wanted = Wanted(host, ports, tuple(name or ()))
        bring_up(project, wanted, say, warn)
        found = find_status(project, named)
        write_json(json_file, found.model_dump(mode="json"))
        show_status(out, found)
        if not found.up:
            raise typer.Exit(FAILED)


def down(json_file: JsonFile = None) -> None:
    """End what `up` started; runs in progress save a checkpoint first."""
    with working(json_file) as project:
        from flows.services.down import take_down

        ended = take_down(project, say)
        write_json(json_file, ended.model_dump(mode="json"))
        for run in ended.runs:
            out.print(f"stopped the run {run}")
        if ended.killed:
            out.print(f"[yellow]killed[/yellow], since they did not end: {ended.killed}")
        names = ", ".join(ended.services)
        out.print(f"[green]ended[/green]: {names}" if names else "Nothing was up.")


def status(json_file: JsonFile = None) -> None:
    """Say what is up, what is scheduled and which runs are in progress; exits with 0 if all is."""
    with looking(json_file) as project:
        from flows.services.status import find_status, named_servers, show_status

        found = find_status(project, named_servers(project))
        write_json(json_file, found.model_dump(mode="json"))
        show_status(out, found)
        if not found.up:
            raise typer.Exit(FAILED)
