"""What a run shows on its page in Prefect beside its steps: links, data, figures, report."""

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from flows.alignment.reports import FIGURES, picture
from flows.alignment.summary import RunSummary
from flows.markdown import link
from flows.services.pages import MlflowPages
from plumbline.refs import PreparedData, StepResult
from tasks.faults import passing, root_cause
from tasks.progress import show_warning

IMAGES = ("curves.png", "reward-kl.png", "scores.png")
"""Figures that a step shows as it makes them; of a cached step, the flow does."""


def show_links(name: str, run_id: str, pages: MlflowPages) -> None:
    """Show where a run is in MLflow, from its first second on."""
    said = [
        f"{link(name, pages.run(run_id))} in MLflow: curves, metrics and files, "
        "step by step, while the run goes on.",
        pages.how_to_open,
    ]
    with _dispensable():
        create_markdown_artifact(
            "\n\n".join(filter(None, said)), key="mlflow", description="This run in MLflow"
        )


def show_results(summary: RunSummary, results: Mapping[str, StepResult], report: str) -> None:
    """Show data, figures and report of a run that is over, whichever of its steps were cached."""
    assert summary.report is not None
    folder = Path(summary.report)
    with _dispensable():
        _show_validation(summary, results["prepare_data"])
        for name, step in summary.steps.items():
            for figure in IMAGES if step.status == "cached" else ():
                if figure in results[name].figures:
                    create_image_artifact(
                        image_url=as_url(folder / figure),
                        key=Path(figure).stem,
                        description=f"{name}: {Path(figure).stem} (cached)",
                    )
        create_markdown_artifact(
            with_pictures(report, folder), key="report", description="What came out, on one page"
        )


def with_pictures(report: str, folder: Path, names: Mapping[str, str] = FIGURES) -> str:
    """A report whose figures are in the text itself, for a page that knows no files."""
    for name, what in names.items():
        report = report.replace(picture(name, what), f"![{what}]({as_url(folder / name)})")
    return report


def as_url(path: Path) -> str:
    """A PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _show_validation(summary: RunSummary, data: StepResult) -> None:
    """Show the rows of each table, unless the step has just shown rows that break a rule."""
    assert isinstance(data, PreparedData)
    failures = int(data.metrics["data/failures"])
    if failures and summary.steps["prepare_data"].status == "ran":
        return
    counts = {
        "rows that break a rule": failures,
        "rows set aside": int(data.metrics["data/quarantined_rows"]),
        "prompts cut": int(data.metrics["data/cut_rows"]),
        "left out as repeats once cut": int(data.metrics["data/merged_rows"]),
    }
    said = ", ".join(f"{name}: {count}" for name, count in counts.items())
    create_table_artifact(
        table=validation_rows(data), key="validation", description=f"Validated; {said}"
    )


def validation_rows(data: PreparedData) -> list[dict[str, Any]]:
    """The tables of the data with their rows."""
    tables = {
        "demonstrations": data.demonstrations,
        "preferences": data.preferences,
        "prompts": data.prompts,
        "ratings": data.ratings,
    }
    return [
        {
            "table": name,
            "rows to train on": table.train.rows,
            "held-out rows": table.test.rows,
            "sha256 of train": table.train.digest[:12],
            "sha256 of held-out": table.test.digest[:12],
        }
        for name, table in tables.items()
        if table is not None
    ]


@contextmanager
def _dispensable() -> Iterator[None]:
    """Let a Prefect that is away cost the page what it shows, and the run nothing."""
    try:
        yield
    except Exception as error:
        if not passing(error):
            raise
        show_warning(f"Prefect does not answer ({root_cause(error)}); the run's page lacks a part")
