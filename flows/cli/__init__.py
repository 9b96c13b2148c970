"""The command line, a module a group of commands; `main` is what `plumbline` calls.

Frameworks are imported inside the commands, so that `--help` and `plan` stay quick.
"""

import atexit
import os
import sys

import typer

from flows.cli import data, models, results, runs, services, storage

app = typer.Typer(
    help="RLHF as declared, cached, tracked experiments.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
# In the order of `--help`.
app.command()(runs.run)
app.command()(runs.plan)
app.command()(runs.sweep)
app.command()(results.reproduce)
app.command()(runs.experiments)
app.command()(models.chat)
app.command()(models.promote)
app.command()(models.serve)
app.command("gc")(storage.collect_garbage)
app.command()(results.compare)
app.command()(storage.verify)
app.command()(services.up)
app.command()(services.down)
app.command()(services.status)

data_app = typer.Typer(help="Look at the data that data.dvc pins.", no_args_is_help=True)
data_app.command("check")(data.check)
data_app.command("status")(data.status)
data_app.command("watch")(data.watch)
data_app.command("import")(data.import_)
app.add_typer(data_app, name="data")


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
