"""What the commands share: options, how each begins, and how an error ends it."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flows.environment import prepare_environment
from flows.stopping import Terminated, terminable
from plumbline.errors import DataError, MachineError, ParamsError, PlumblineError
from plumbline.project import Project, find_project, make_home

FAILED, INVALID, INTERRUPTED, TERMINATED = 1, 2, 130, 143
GO_ON = "the same command goes on from the last checkpoint"

out = Console()
err = Console(stderr=True)

Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change a param, e.g. rl.kl_coef=0.1."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]


def say(text: str) -> None:
    """Tell how far a command has come."""
    err.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Tell what nobody should overlook."""
    err.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def looking(json_file: Path | None = None) -> Iterator[Project]:
    """The project, for a command that writes nothing there; its errors become exit codes.

    Args:
        json_file: where the result is to go; what can't be written should not cost a run.
    """
    with _errors_as_exit_codes():
        project = find_project()
        prepare_environment(project)
        _check_writable(json_file)
        yield project


@contextmanager
def writing(json_file: Path | None = None) -> Iterator[Project]:
    """The project, for a command that needs its folder for generated files."""
    with looking(json_file) as project:
        make_home(project.home)
        yield project


@contextmanager
def working(json_file: Path | None = None) -> Iterator[Project]:
    """The project, for a command that puts everything away before SIGTERM ends it."""
    with writing(json_file) as project, terminable():
        yield project


def write_json(path: Path | None, value: Mapping[str, Any]) -> None:
    """Write a result as a whole, if a file was named for it."""
    if path is None:
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def _check_writable(path: Path | None) -> None:
    if path is not None and not (
        path.parent.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
    ):
        raise MachineError(
            f"--json {path}: expected a file that can be written, in a folder that is there"
        )


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
