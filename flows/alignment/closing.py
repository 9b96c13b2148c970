"""The closing words of a run on the terminal."""

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.alignment.headline import estimates, headline
from flows.alignment.summary import RunSummary
from flows.markdown import plain
from flows.services.prefect_server import is_own
from flows.services.processes import MLFLOW, PREFECT
from flows.services.status import running_url
from plumbline.addresses import without_credentials
from plumbline.project import Project

SHOWN_SAMPLES = 4
START = "plumbline up"


def show_run(console: Console, project: Project, summary: RunSummary) -> None:
    """Print what a run has done, or that it had nothing to do."""
    show = show_up_to_date if summary.mlflow_run_id is None else show_summary
    show(console, project, summary)


def show_summary(console: Console, project: Project, summary: RunSummary) -> None:
    """Print steps, samples before and after, metrics, figures, and how to open the two UIs."""
    console.print(_samples(summary))
    console.print(_metrics(summary))
    console.print(_steps(summary))
    if summary.report is not None:
        report = Path(summary.report)
        console.print(f"\n[bold]Figures and report[/bold] in {_shown(report)}:")
        console.print("  " + "  ".join(sorted(path.name for path in report.iterdir())))
    _ways_on(console, project, summary)


def show_up_to_date(console: Console, project: Project, summary: RunSummary) -> None:
    """Print that nothing is to do, and where everything is."""
    console.print(
        f"[green]Nothing to do[/green]: all {len(summary.steps)} steps of "
        f"[bold]{summary.experiment}[/bold] are up to date. `plumbline run {summary.experiment} "
        "--record` makes a tracked run all the same."
    )
    table = Table("step", "made by the MLflow run", "digest", box=None, pad_edge=False)
    for name, step in summary.steps.items():
        table.add_row(name, step.mlflow_run_id, step.digest[:12])
    console.print(table)
    console.print(_metrics(summary))
    _ways_on(console, project, summary)


def _ways_on(console: Console, project: Project, summary: RunSummary) -> None:
    name, version = summary.registered["name"], summary.registered["version"]
    alias = summary.registered.get("alias")
    named = f", alias {alias}; talk to it: plumbline chat {name}@{alias}"
    numbered = f"; talk to it: plumbline chat {name}/{version}"
    console.print(
        f"[bold]Registered[/bold] as {name} version {version}{named if alias else numbered}"
    )
    console.print("[bold]Look closer:[/bold]")
    for name, command in ui_commands(project).items():
        console.print(f"  {name}: {command}", soft_wrap=True, highlight=False)


def ui_commands(project: Project) -> dict[str, str]:
    """How to open the UIs on this project's runs: a command, or the address of a running server."""
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "")
    named = {
        MLFLOW: tracking if tracking.startswith("http") else None,
        PREFECT: None if is_own() else os.environ.get("PREFECT_API_URL"),
    }
    return {
        label: without_credentials(named[name] or running_url(project, name) or START).removesuffix(
            "/api"
        )
        for label, name in {"MLflow": MLFLOW, "Prefect": PREFECT}.items()
    }


def _samples(summary: RunSummary) -> Table:
    table = Table("prompt", "before (SFT)", "after (RL)", title="Held-out samples", show_lines=True)
    better = sorted(
        summary.samples,
        key=lambda row: float(row["policy_score"]) - float(row["sft_score"]),
        reverse=True,
    )
    # Spread over the whole range of outcomes: the best alone would flatter.
    step = max(1, len(better) // SHOWN_SAMPLES)
    for row in better[::step][:SHOWN_SAMPLES]:
        table.add_row(
            plain(str(row["prompt"])),
            Text.assemble(plain(row["sft"]), (f"\nscore {row['sft_score']:.2f}", "dim")),
            Text.assemble(plain(row["policy"]), (f"\nscore {row['policy_score']:.2f}", "dim")),
        )
    return table


def _metrics(summary: RunSummary) -> Table:
    table = Table("metric", "SFT", "policy", title="Held-out prompts")
    for label, sft, policy in headline(summary.metrics):
        table.add_row(label, f"{sft:.3f}", f"{policy:.3f}")
    for label, estimate in estimates(summary.metrics):
        table.add_row(label, "", estimate)
    return table


def _steps(summary: RunSummary) -> Table:
    table = Table(
        "step", "status", "seconds", title=f"{summary.experiment}, {summary.seconds:.0f} s"
    )
    for name, step in summary.steps.items():
        colour = "green" if step.status == "cached" else "yellow"
        table.add_row(name, f"[{colour}]{step.status}[/]", f"{step.seconds:.1f}")
    return table


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
