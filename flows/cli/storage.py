"""What is kept on disk: `gc`, `verify`."""

from typing import Annotated

import typer

from flows.cli.common import FAILED, looking, out, writing


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
    with writing() as project:
        from flows.storage.housekeeping import collect, waste_table

        out.print(waste_table(collect(project, keep_last, delete=delete)))
        if not delete:
            out.print("Nothing was removed; [bold]--delete[/bold] removes what is listed.")


def verify() -> None:
    """Hash everything that is stored, and name what is not as it was made."""
    with looking() as project:
        from flows.storage.verifying import show_verified, verify_everything

        found = verify_everything(project)
        show_verified(out, found)
        if found.damaged:
            raise typer.Exit(FAILED)
